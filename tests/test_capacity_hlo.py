"""Collectives and cycles read from small HLO texts."""

import pytest

from avd_jax.capacity.hlo import Loop, cudnn_workspace, profile

HLO = """HloModule jit_step, is_scheduled=true

%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %inner = bf16[8,128]{1,0} add(%p, %p), backend_config={"estimated_cycles":"1000"}
}

%body (carry: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %carry = (s32[], bf16[8,128]{1,0}) parameter(0)
  %x = bf16[8,128]{1,0} get-tuple-element(%carry), index=1
  %all-gather.1 = bf16[32,128]{1,0} all-gather(%x), dimensions={0}
  %fusion.1 = bf16[8,128]{1,0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  ROOT %t = (s32[], bf16[8,128]{1,0}) tuple(%x)
}

%condition (carry: (s32[], bf16[8,128])) -> pred[] {
  %carry = (s32[], bf16[8,128]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true), backend_config={"estimated_cycles":"9223372036854775807"}
}

ENTRY %main (a: bf16[8,128]) -> f32[4] {
  %a = bf16[8,128]{1,0} parameter(0)
  %big = f32[64]{0} broadcast(%a), backend_config={"estimated_cycles":"7"}
  %loop = (s32[], bf16[8,128]{1,0}) while(%a), condition=%condition, body=%body, TRIPS
  %scatter = f32[16]{0} reduce-scatter(%big), to_apply=%fused
  %start = (f32[64]{0}, f32[64]{0}) all-reduce-start(%big), to_apply=%fused
  ROOT %done = f32[64]{0} all-reduce-done(%start)
}
"""
KNOWN = HLO.replace("TRIPS", 'backend_config={"known_trip_count":{"n":"30"}}')
UNKNOWN = HLO.replace(", TRIPS", "")
GATHERED = 32 * 128 * 2


def test_a_loops_body_counts_as_often_as_it_runs():
    found = profile(KNOWN)
    assert found.collective_bytes == {"all-gather": 30 * GATHERED, "all-reduce": 256, "reduce-scatter": 256}
    # The fusion's estimate covers what is in it; the condition has none.
    assert found.cycles == 30 * 10 + 7


def test_an_all_reduce_of_which_a_slice_stays_is_a_reduce_scatter():
    """As the TPU's compiler writes it; only the slice is sent back."""
    text = KNOWN.replace("%fused", "%all-reduce-scatter.1")
    text = text.replace("%inner = bf16[8,128]{1,0} add(%p, %p)", "%inner = bf16[8,128]{1,0} all-reduce(%p)")
    assert profile(text).collective_bytes["reduce-scatter"] == 256 + 30 * 8 * 128 * 2
    assert profile(text).collective_bytes["all-reduce"] == 256


def test_a_loop_of_unknown_length_takes_the_number_given():
    assert profile(UNKNOWN, dynamic_trips=1.5).collective_bytes["all-gather"] == 1.5 * GATHERED
    assert profile(UNKNOWN).cycles == 10 + 7


def test_a_collective_that_runs_beside_products_counts_once():
    """The TPU's compiler puts it into the fusion that starts it, into those that it runs beside, and into the last."""
    gather = "all-gather(%p), dimensions={0}, channel_id=7"
    text = KNOWN.replace("%inner = bf16[8,128]{1,0} add(%p, %p)", f"%inner = bf16[32,128]{{1,0}} {gather}")
    text = text.replace("all-gather(%x), dimensions={0}", "all-gather(%x), dimensions={0}, channel_id=8")
    line = "  %fusion.1 = bf16[8,128]{1,0} fusion(%x), kind=kLoop, calls=%fused"
    text = text.replace(line, line.replace("fusion.1", "start") + "\n" + line.replace("fusion.1", "step") + "\n" + line)
    assert profile(text).collective_bytes["all-gather"] == 30 * 2 * GATHERED


# As the TPU's compiler writes loops: no trip counts, copies between, steps and bounds that the tuple carries.
NESTED = """HloModule jit_step, is_scheduled=true

%inner (p: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %p = (s32[], s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[] get-tuple-element(%p), index=1
  %once = s32[] add(%i, %two)
  %twice = s32[] add(%once, %two)
  %x = f32[8] get-tuple-element(%p), index=2
  %y = f32[8] negate(%x), backend_config={"estimated_cycles":"100"}
  ROOT %t = (s32[], s32[], f32[8]) tuple(%twice, %two, %y)
}

%inner_condition (p: (s32[], s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(15), backend_config={"flag_configs":[]}
  %p = (s32[], s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%outer (q: (s32[], f32[8], s32[], s32[])) -> (s32[], f32[8], s32[], s32[]) {
  %q = (s32[], f32[8], s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %copied = s32[] copy(%j)
  %v = f32[8] get-tuple-element(%q), index=1
  %length = s32[] get-tuple-element(%q), index=2
  %step = s32[] get-tuple-element(%q), index=3
  %zero = s32[] constant(0)
  %two = s32[] constant(2)
  %packed = (s32[], s32[], f32[8]) tuple(%zero, %two, %v)
  %within = (s32[], s32[], f32[8]) while(%packed), condition=%inner_condition, body=%inner
  %w = f32[8] get-tuple-element(%within), index=2
  %next = s32[] add(%step, %copied), backend_config={"estimated_cycles":"1"}
  ROOT %t = (s32[], f32[8], s32[], s32[]) tuple(%next, %w, %length, %step)
}

%outer_condition (q: (s32[], f32[8], s32[], s32[])) -> pred[] {
  %q = (s32[], f32[8], s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %length = s32[] get-tuple-element(%q), index=2
  ROOT %less = pred[] compare(%j, %length), direction=LT
}

ENTRY %main (a: f32[8], drawn: s32[]) -> f32[8] {
  %a = f32[8] parameter(0)
  %drawn = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = s32[] constant(1)
  %thirty = s32[] constant(30)
  %packed = (s32[], f32[8], s32[], s32[]) tuple(%zero, %a, %thirty, %one)
  %loop = (s32[], f32[8], s32[], s32[]) while(%packed), condition=%outer_condition, body=%outer
  ROOT %out = f32[8] get-tuple-element(%loop), index=1
}
"""
INNER = 4  # from 0 in fours while below 15


@pytest.mark.parametrize(
    ("old", "new", "cycles", "unknown"),
    [
        ("", "", 30 * (INNER * 100 + 1), 0),
        ("tuple(%zero, %a, %thirty", "tuple(%zero, %a, %drawn", 1.5 * (INNER * 100 + 1), 1),
        # A bound that a trip changes, a condition of another kind, a counter that does not move.
        ("tuple(%next, %w, %length", "tuple(%next, %w, %copied", 1.5 * (INNER * 100 + 1), 1),
        ("compare(%i, %bound), direction=LT", "compare(%i, %bound), direction=NE", 30 * (1.5 * 100 + 1), 1),
        ("tuple(%twice, %two, %y)", "tuple(%i, %two, %y)", 30 * (1.5 * 100 + 1), 1),
        ("constant(15)", "constant(0)", 30, 0),
    ],
)
def test_trips_follow_from_conditions_loops_inside_loops_too(old, new, cycles, unknown):
    assert old in NESTED
    found = profile(NESTED.replace(old, new) if old else NESTED, dynamic_trips=1.5)
    assert (found.cycles, found.unknown_loops) == (round(cycles), unknown)


def test_a_loops_trip_is_told_apart_from_the_loops_inside_it():
    assert profile(NESTED).loops == (Loop(1, INNER * 100), Loop(100, 0))


def test_the_workspace_of_cudnns_largest_backward_pass():
    def call(name, shape):
        return f'  %c = (bf16[{shape}]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q), custom_call_target="__cudnn${name}"'

    forward, small = call("fmhaSoftmax", "9,12,32760,128"), call("fmhaSoftmaxBackward", "1,12,512,128")
    large = call("fmhaSoftmaxBackward", "2,12,32760,128")
    assert cudnn_workspace("\n".join([forward, small, large])) == 4 * 2 * 12 * 32760 * (128 + 1)
    assert cudnn_workspace(KNOWN) == 0
