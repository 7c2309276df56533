"""Where a compiled program's time goes."""

import jax
import jax.numpy as jnp
import pytest

from xattn.bench.profile import meanings, profile

HLO = """
ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0), metadata={op_name="x"}
  %dot.3 = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, metadata={op_name="jit(f)/Model/block_11/attn/query/dot_general" id=3}
  %add_fusion = f32[8,8]{1,0} fusion(%dot.3), kind=kLoop, metadata={op_name="jit(f)/transpose(jvp(Model))/block_2/norm1/add"}
  %while.1 = (s32[], f32[8,8]{1,0}) while(%t), condition=%c, body=%b, metadata={op_name="jit(f)/while"}
  %copy.2 = f32[8,8]{0,1} copy(%add_fusion)
  ROOT %call = f32[8,8]{1,0} call(%copy.2), to_apply=%g
}
"""  # noqa: E501


def test_an_instruction_is_named_by_module_operation_and_direction():
    found = meanings(HLO)
    assert found["dot.3"] == "query/dot_general"
    assert found["add_fusion"] == "backward of norm*/add"
    assert found["copy.2"] == "copy"


def test_what_only_runs_others_is_not_counted_twice():
    assert {"while.1", "call"}.isdisjoint(meanings(HLO))


def test_the_largest_part_comes_first_and_parts_make_the_whole():
    def function(x):
        with jax.named_scope("large"):
            y = x @ x
        with jax.named_scope("small"):
            return jnp.sort(y[0])

    x = jnp.ones((512, 512))
    program = jax.jit(function).lower(x).compile()
    parts = profile(lambda: program(x), program.as_text())
    assert parts[0]["what"] == "large/dot_general"
    assert sum(part["share"] for part in parts) == pytest.approx(1)
    (cut, rest) = profile(lambda: program(x), program.as_text(), lines=1)
    assert rest["what"] == "the rest" and cut["share"] + rest["share"] == pytest.approx(1)
