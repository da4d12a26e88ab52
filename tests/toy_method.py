"""A whole method in one file: two networks, two updates, two terms of one loss. CONTRIBUTING walks through it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from avd_jax.fields import Field, check_values, not_negative, with_defaults
from avd_jax.parallel.hosts import batch_rows
from avd_jax.parallel.mesh import make_mesh
from avd_jax.training.batches import CountedBatches
from avd_jax.training.config import RUN_FIELDS
from avd_jax.training.method import BatchField, Method, Recipe, Term, Trained, Update, Value

FIELDS = {
    **with_defaults(RUN_FIELDS, method="toy", num_steps=6, checkpoint_every=2),
    "rate": Field(0.1, "learning rate of both networks", not_negative),
    "loss.small": Field(0.01, "weight of the line's size; 0 switches the term off", not_negative),
}


def points(size, number):
    x = np.random.default_rng(number).standard_normal(size).astype(np.float32)
    return {"x": x, "y": 2 * x - 1}


def build(config, *, devices=None, video=None) -> Method:
    mesh, adam = make_mesh(devices=devices), optax.adam(config.rate)
    rows = batch_rows(mesh, config.batch_size).rows
    field = BatchField(jax.ShapeDtypeStruct((config.batch_size,), jnp.float32))

    def network(*names):
        start = {name: jnp.ones(()) for name in names}
        return Trained(jax.eval_shape(lambda: start), lambda shardings: start, adam, ema_decay=lambda step: 0.5)

    error = Value("error", ("line", "x", "y"), lambda line, x, y: line["slope"] * x + line["height"] - y)
    guess = Term("guess", 1.0, ("guess", "error"), lambda guess, error: (guess["size"] - jnp.abs(error)) ** 2)
    fit = Term("fit", 1.0, ("error",), lambda error: error**2)
    small = Term("small", config.loss.small, ("line",), lambda line: line["slope"] ** 2 + line["height"] ** 2)
    networks = {"guess": network("size"), "line": network("slope", "height")}
    updates = Update("guess", "guess", (guess,), (error,), times=2), Update("line", "line", (fit, small), (error,))
    return Method(
        name="toy",
        main="line",
        mesh=mesh,
        networks=networks,
        updates=updates,
        fields={"x": field, "y": field},
        batches=lambda fresh: CountedBatches(partial(points, config.batch_size), rows),
    )


RECIPE = Recipe("toy", FIELDS, partial(check_values, fields=FIELDS), partial(check_values, fields=FIELDS), build)
