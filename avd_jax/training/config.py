"""The fields that every method's config has, whatever it trains: what the trainer itself reads."""

from avd_jax.fields import Field, Fields, at_least, below_one, not_negative, one_of


def _seed(value: int) -> str | None:
    return None if 0 <= value < 2**32 else "must be 0..2^32 - 1"


RUN_FIELDS: Fields = {
    "method": Field("", "what is trained, and how: a folder of avd_jax/methods"),
    "seed": Field(0, "decides the initial weights of new networks, the order of the data and all noise", _seed),
    "num_steps": Field(
        1000, "updates of the main network in the run; a learning rate that falls does so over them", at_least(1)
    ),
    "batch_size": Field(8, "examples an update, over all devices", at_least(1)),
    "log_every": Field(1, "steps between two lines of metrics.jsonl", at_least(1), changeable=True),
    "checkpoint_every": Field(
        100, "steps between two checkpoints; 0: only at the end and on SIGTERM", not_negative, changeable=True
    ),
    "checkpoint.keep": Field(2, "newest checkpoints to keep", at_least(1), changeable=True),
    "checkpoint.best_metric": Field(
        "", "keep the best checkpoint by this metric too, such as 'loss/regression'", changeable=True
    ),
    "checkpoint.best_mode": Field(
        "min", "whether the best is the 'min' or the 'max'", one_of(("min", "max")), changeable=True
    ),
    "max_nonfinite": Field(
        10, "updates in a row that may be skipped for a non-finite loss before the run stops", at_least(1)
    ),
}
ACCUMULATION_FIELDS: Fields = {
    "accumulation_steps": Field(
        1,
        "parts that a batch is cut into to save memory; gradients are averaged",
        at_least(1),
        changeable=True,
    ),
}
MESH_FIELDS: Fields = {
    "mesh.data": Field(-1, "devices along the data axis; -1: all that the others leave", changeable=True),
    "mesh.fsdp": Field(
        1,
        "devices along the axis that shares parameters and batch; with seq -1 too: as the batch allows",
        changeable=True,
    ),
    "mesh.seq": Field(
        1,
        "devices along the axis that shares parameters and tokens; must divide the heads (Wan: 12 or 40)",
        changeable=True,
    ),
}
SCHEDULE_FIELDS: Fields = {  # of a training whose learning rate rises and falls (`optimizers.scheduled`)
    "optimizer.learning_rate": Field(1e-3, "AdamW's highest learning rate", not_negative, recorded=True),
    "optimizer.warmup_steps": Field(200, "updates over which it rises from zero", not_negative),
    "optimizer.beta1": Field(0.9, "AdamW's decay of the first moment", below_one),
    "optimizer.beta2": Field(0.99, "AdamW's decay of the second moment", below_one),
    "optimizer.weight_decay": Field(0.0, "AdamW's decoupled weight decay", not_negative, recorded=True),
    "optimizer.max_grad_norm": Field(1.0, "gradients are scaled down to this global norm", not_negative, recorded=True),
    "ema_decay": Field(
        0.999, "decay of the running mean of the weights, which is what is used afterwards", below_one, recorded=True
    ),
}
