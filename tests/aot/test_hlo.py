"""Reading optimized HLO, of programs compiled here and of lines that other compilers write."""
import jax
import jax.numpy as jnp
import pytest

from sharding_rules import make_mesh
from tpllm.aot.hlo import collectives, materialized, num_aliased, read_instructions, replica_groups
from tpllm.aot.report import compile_lowered

# What libtpu and XLA:GPU write, shortened: tiled layouts with parentheses, memory spaces, asynchronous tuples, computations of fusions.
DEVICE_TEXT = """HloModule jit_step, input_output_alias={ {0}: (1, {}, may-alias), {1, 0}: (2, {}, must-alias) }

%fused_computation.3 (param_0: bf16[64,128]) -> bf16[128,64] {
  %param_0 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %transpose.1 = bf16[128,64]{1,0:T(8,128)(2,1)} transpose(%param_0), dimensions={1,0}
}

ENTRY %main.9_spmd (param.1: bf16[64,128], param.2: f32[16]) -> (bf16[128,64], f32[16]) {
  %param.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %slice-start.2 = ((bf16[64,128]{1,0:T(8,128)(2,1)}), bf16[32,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%param.1), slice={[0:32]}
  %slice-done.2 = bf16[32,128]{1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start.2)
  %fusion.3 = bf16[128,64]{1,0:T(8,128)(2,1)} fusion(%param.1), kind=kLoop, calls=%fused_computation.3, metadata={op_name="jit(step)/transpose"}
  %all-gather-start.1 = (f32[4]{0}, f32[16]{0}) all-gather-start(%bitcast.5), replica_groups={{0,1,2,3}}, dimensions={0}
  %all-gather-done.1 = f32[16]{0} all-gather-done(%all-gather-start.1)
  %all-reduce-start.3 = ((bf16[8,2]{1,0}, f32[5]{0}), (bf16[8,2]{1,0}, f32[5]{0})) all-reduce-start(%c, %d), replica_groups={{0,1,2,3}}
  %all-reduce.7 = (f32[]{:T(128)}, /*index=1*/pred[16]{0:T(512)(128)(4,1)}) all-reduce(%a, %b), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %tuple.1 = (bf16[128,64]{1,0:T(8,128)(2,1)}, f32[16]{0}) tuple(%fusion.3, %all-gather-done.1)
}
"""


def test_instructions_of_device_compilers_are_read_with_their_shapes_memories_and_phases():
    found = {(instruction.op, instruction.phase): instruction for instruction in read_instructions(DEVICE_TEXT)}
    assert [array.shape for array in found["all-reduce", ""].results] == [(), (16,)]
    assert [array.num_bytes for array in found["all-reduce", ""].results] == [4, 16]
    assert [array.is_on_chip for array in found["slice", "start"].results] == [True, False]
    assert [found[name].num_tuples for name in (("slice", "start"), ("all-reduce", "start"), ("all-reduce", ""), ("fusion", ""))] == [2, 3, 1, 0]
    assert found["fusion", ""].largest.shape == (128, 64)
    assert found["fusion", ""].largest.num_bytes == 2 * 128 * 64
    assert found["transpose", ""].is_fused
    assert not found["fusion", ""].is_fused
    assert found["transpose", ""].computation == "fused_computation.3"


def test_an_asynchronous_collective_counts_once_and_with_what_it_gathers():
    found = collectives(read_instructions(DEVICE_TEXT))
    assert [instruction.op for instruction in found] == ["all-gather", "all-reduce", "all-reduce"]
    assert [instruction.largest.num_elements for instruction in found] == [16, 16, 16]
    assert [array.shape for array in found[1].results] == [(8, 2), (5,)]


def test_views_prefetches_and_what_is_inside_a_fusion_are_not_written_to_memory():
    assert [instruction.op for instruction in materialized(read_instructions(DEVICE_TEXT))] == ["fusion", "all-gather", "all-reduce"]


def test_aliased_outputs_are_counted_nested_ones_too():
    assert num_aliased(DEVICE_TEXT) == 2
    assert num_aliased("HloModule jit_step, is_scheduled=true\n") == 0


def test_a_gathered_and_copied_array_would_be_seen():
    mesh = make_mesh({"tp": 2})
    split = jax.NamedSharding(mesh, jax.P("tp"))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=split)
    program = compile_lowered(jax.jit(lambda x: (x.T, x), out_shardings=(split, jax.NamedSharding(mesh, jax.P()))).lower(x))
    assert ("all-gather", "f32", 64 * 32) in [(found.op, found.largest.dtype, found.largest.num_elements) for found in program.instructions]
    assert any(found.op in ("copy", "transpose") and found.largest.num_elements >= 16 * 64 for found in program.instructions)


def test_a_report_names_collectives_bytes_and_what_stays_in_place():
    mesh = make_mesh({"tp": 4})
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(None, "tp")))
    described = compile_lowered(jax.jit(lambda x: (x + 1, x.sum(1)), donate_argnums=0).lower(x)).describe()
    assert described["collectives"] == [{"op": "all-reduce", "result": "f32[8]", "count": 1}]
    assert described["num_aliased"] == 1
    assert described["argument_bytes"] == described["aliased_bytes"] == 4 * 8 * 16


@pytest.mark.parametrize(("text", "groups"), [
    ("replica_groups={{0,2},{1,3}}, x", [{0, 2}, {1, 3}]),
    ("replica_groups=[2,4]<=[8], x", [{0, 1, 2, 3}, {4, 5, 6, 7}]),
    ("replica_groups=[4,2]<=[2,4]T(1,0), x", [{0, 4}, {1, 5}, {2, 6}, {3, 7}]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [{0, 1}, {2, 3}]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [{0, 2}, {1, 3}]),
])
def test_replica_groups_are_read_in_every_notation(text, groups):
    assert replica_groups(text) == groups


def test_a_line_without_replica_groups_is_an_error():
    with pytest.raises(ValueError, match="no replica groups"):
        replica_groups("%x = f32[] add(%a, %b)")
