"""Collectives and cycles read from small HLO texts."""

from avd_jax.capacity.hlo import cudnn_workspace, profile

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


def test_a_loop_of_unknown_length_takes_the_number_given():
    assert profile(UNKNOWN, dynamic_trips=1.5).collective_bytes["all-gather"] == 1.5 * GATHERED
    assert profile(UNKNOWN).cycles == 10 + 7


def test_the_workspace_of_cudnns_largest_backward_pass():
    def call(name, shape):
        return f'  %c = (bf16[{shape}]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q), custom_call_target="__cudnn${name}"'

    forward, small = call("fmhaSoftmax", "9,12,32760,128"), call("fmhaSoftmaxBackward", "1,12,512,128")
    large = call("fmhaSoftmaxBackward", "2,12,32760,128")
    assert cudnn_workspace("\n".join([forward, small, large])) == 4 * 2 * 12 * 32760 * (128 + 1)
    assert cudnn_workspace(KNOWN) == 0
