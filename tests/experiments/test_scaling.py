"""The scaling study's own pieces, on the CPU: its losses, its steps, and how it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.scaling import hlo, report, steps
from experiments.scaling.__main__ import CELLS, SMALL_CELLS
from experiments.scaling.compile import Cell, lowered, measure, prepare
from experiments.scaling.flops import flops_of
from experiments.scaling.models import MODELS, SMALL, count_parameters
from experiments.scaling.steps import (
    BUDGET,
    EXACT,
    LAGGED,
    LOOKAHEAD,
    METHODS,
    PLAIN,
    UTILITIES,
    Batch,
    in_one_pass,
    in_two_passes,
    initial_parts,
)
from experiments.shared.models.llama.config import Config, projection_shapes
from experiments.shared.models.llama.model import Compute, logits, map_logits
from experiments.shared.models.lora import Adapter
from experiments.shared.models.sharding import FSDP, TENSOR, shardings
from experiments.shared.records import open_records
from experiments.shared.report import read_csv

TINY = Config(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)
CELL = Cell("tiny", "v5e:2x4", fsdp=4, tensor=2, sequences=1, time=8)


def cpu_mesh(cell):
    devices = np.array(jax.devices()[: cell.chips]).reshape(cell.fsdp, cell.tensor)
    return Mesh(devices, (FSDP, TENSOR))


def some_tokens(config, amount, time):
    shape = amount, 1 + UTILITIES, time + 1
    return np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)


def some_parts(config, lora, dtype=None):
    """Parts in which nothing is 0, in their own dtypes or in one; NumPy draws them, nothing is compiled."""
    draw = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: initial_parts(config, lora, jax.random.key(0)))
    return jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), dtype or s.dtype), shapes)


def test_models_have_the_published_numbers_of_parameters():
    """Their model cards: 1.24e9, 1.7e9, 6.74e9, 7.62e9 and 69.0e9."""
    counts = {name: count_parameters(config) for name, config in MODELS.items()}
    assert counts["Llama-2-7B"] == 6_738_415_616
    assert counts["Llama-2-70B"] == 68_976_648_192
    assert counts["Llama-3.2-1B"] == 1_235_814_400
    assert counts["Qwen2-7B"] == 7_615_616_512
    assert counts["Qwen3-1.7B"] == 1_720_574_976


@pytest.mark.parametrize("cell", [*CELLS, *SMALL_CELLS], ids=report.label)
def test_a_mesh_divides_every_model(cell):
    config = (MODELS | SMALL)[cell.model]
    heads = config.num_attention_heads, config.num_key_value_heads
    split = [config.vocab_size, config.intermediate_size, *heads]
    assert all(size % cell.tensor == 0 for size in split)
    assert config.hidden_size % (cell.fsdp * cell.tensor) == 0


@pytest.mark.parametrize("lora", [False, True])
def test_losses_are_those_of_all_logits(lora, x64, monkeypatch):
    """Unlikelihood of the first text, cross-entropy of each other one; the chunks divide no text."""
    monkeypatch.setattr(steps, "CHUNK", 3)
    trained, frozen = some_parts(TINY, lora, np.float64)
    model, tokens = trained | frozen, some_tokens(TINY, 2, 8)
    adapters = [Adapter(steps.SCALE, model["adapter"])] if lora else []

    @jax.jit
    def run(tokens):
        read = tokens[..., :-1].reshape(-1, 8)
        losses = [make(TINY)(trained, Batch(frozen, tokens)) for make in (in_one_pass, in_two_passes)]
        return logits(TINY, model["base"], read, adapters), losses

    z, found = run(tokens)
    z = np.asarray(z).reshape(2, 1 + UTILITIES, 8, -1)
    p = np.take_along_axis(np.exp(z), tokens[..., 1:, None], -1)[..., 0] / np.exp(z).sum(-1)
    for losses in found:
        np.testing.assert_allclose(losses.forget, -np.log1p(-p[:, 0]).mean(), rtol=1e-10)
        np.testing.assert_allclose(losses.retain, -np.log(p[:, 1:]).mean((0, 2)), rtol=1e-10)


def hand_counted(config, texts, time):
    """FLOPs of one pass: (all layers, the head)."""
    linear = sum(2 * outputs * inputs for outputs, inputs in projection_shapes(config).values())
    attention = 2 * 2 * time * config.num_attention_heads * config.head_dim
    layers = texts * time * config.num_hidden_layers * (linear + attention)
    return layers, texts * time * 2 * config.hidden_size * config.vocab_size


@pytest.mark.parametrize("lora", [False, True])
def test_flops_by_hand(lora):
    """Forward, all recomputed but the last product of a layer, scores once more, and the gradients."""
    texts, time = 2 * (1 + UTILITIES), 8
    of_layers = texts * time * TINY.num_hidden_layers
    down = of_layers * 2 * TINY.hidden_size * TINY.intermediate_size
    scores = of_layers * 2 * time * TINY.num_attention_heads * TINY.head_dim
    sizes = [projection_shapes(TINY)[name] for name in ("q_proj", "v_proj")]
    low_rank = of_layers * 2 * steps.RANK * sum(map(sum, sizes)) if lora else 0
    forward = sum(hand_counted(TINY, texts, time)) + low_rank
    # As much as forward for the activations, and as much for the weights; attention has none.
    of_weights = 2 * scores + low_rank if lora else forward
    trained, frozen = jax.eval_shape(lambda: initial_parts(TINY, lora, jax.random.key(0)))
    batch = Batch(frozen, jax.ShapeDtypeStruct((2, 1 + UTILITIES, time + 1), jnp.int32))

    def total(trained, batch):
        losses = in_one_pass(TINY)(trained, batch)
        return losses.forget + losses.retain.sum()

    count = lambda function: flops_of(jax.make_jaxpr(function)(trained, batch).jaxpr)
    assert count(total) == forward
    assert count(jax.value_and_grad(total)) == 3 * forward - down + scores + of_weights


def test_flops_of_an_unrolled_program():
    """What XLA counts where there is no loop that it would count once."""
    config = SMALL["small"]
    params = some_parts(config, False).trained["base"]
    tokens = some_tokens(config, 1, 32).reshape(3, 33)

    def loss(params):
        hidden = steps.hidden_states(config, params, tokens[:, :-1], compute=Compute(remat=True, unroll=True))
        return jnp.sum(map_logits(steps.objectives.cross_entropy, params, hidden, tokens[:, 1:], chunk=32))

    gradient = jax.jit(jax.grad(loss))
    counted = gradient.lower(params).compile().cost_analysis()["flops"]
    assert flops_of(jax.make_jaxpr(gradient)(params).jaxpr) == pytest.approx(counted, rel=0.1)


def step_flops(method, lora):
    chosen, tokens = METHODS[method](TINY), jax.ShapeDtypeStruct((2, 1 + UTILITIES, 9), jnp.int32)
    trained, frozen = jax.eval_shape(lambda: initial_parts(TINY, lora, jax.random.key(0)))
    state = jax.eval_shape(chosen.init, trained)
    return flops_of(jax.make_jaxpr(chosen.step)(trained, state, Batch(frozen, tokens)).jaxpr)


@pytest.mark.parametrize("lora", [False, True])
def test_only_the_look_ahead_costs_flops(lora):
    """It evaluates all texts once more, but for the logits of those to forget, which nothing reads."""
    plain = step_flops(PLAIN, lora)
    assert step_flops(BUDGET, lora) == step_flops(LAGGED, lora) == plain
    texts, time = 2 * (1 + UTILITIES), 8
    layers, head = hand_counted(TINY, texts, time)
    sizes = [projection_shapes(TINY)[name] for name in ("q_proj", "v_proj")]
    low_rank = texts * time * TINY.num_hidden_layers * 2 * steps.RANK * sum(map(sum, sizes)) if lora else 0
    retained = layers + low_rank + head * UTILITIES / (1 + UTILITIES)
    assert step_flops(LOOKAHEAD, lora) == plain + retained


TEXT = """HloModule step, is_scheduled=true

%all-reduce-scatter.1 (p: bf16[64,8]) -> bf16[16,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  %all-reduce.1 = bf16[64,8]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %ds = bf16[16,8]{1,0} dynamic-slice(%all-reduce.1, %i), dynamic_slice_sizes={16,8}
}

%gather_start (p.1: bf16[16,8]) -> bf16[64,8] {
  %p.1 = bf16[16,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[64,8]{1,0} all-gather(%p.1), channel_id=2, replica_groups=[2,4]<=[8], \
dimensions={0}, frontend_attributes={chain_id="7"}
}

%gather_done (p.2: bf16[16,8]) -> bf16[64,8] {
  %p.2 = bf16[16,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[64,8]{1,0} all-gather(%p.2), channel_id=2, replica_groups=[2,4]<=[8], \
dimensions={0}, frontend_attributes={chain_id="7"}
}

%body (t: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %t = (s32[]{:T(128)}, bf16[16,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = bf16[16,8]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %start = bf16[64,8]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kCustom, calls=%gather_start
  %done = bf16[64,8]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kCustom, calls=%gather_done
  %y = bf16[16,8]{1,0:T(8,128)(2,1)} fusion(%done), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[]{:T(128)}, bf16[16,8]{1,0:T(8,128)(2,1)}) tuple(%i, %y)
}

%condition (t.1: (s32[], bf16[16,8])) -> pred[] {
  %t.1 = (s32[]{:T(128)}, bf16[16,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %bound = s32[]{:T(128)} constant(5)
  %i.1 = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (a: bf16[16,8]) -> bf16[16,8] {
  %a = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, bf16[16,8]{1,0:T(8,128)(2,1)}) tuple(%zero, %a)
  %loop = (s32[]{:T(128)}, bf16[16,8]{1,0:T(8,128)(2,1)}) while(%init), condition=%condition, body=%body
  %b = bf16[16,8]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
  %s = (bf16[16,8]{1,0}, bf16[16,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%b), channel_id=3, \
source_target_pairs={{0,1},{1,0}}
  %d = bf16[16,8]{1,0} collective-permute-done(%s)
  ROOT %r = bf16[16,8]{1,0} all-reduce(%d), replica_groups=mesh['a'=4,'b'=2] {'b'}, to_apply=%add
}
"""


def test_collectives_by_hand():
    """Five rounds of one gather in two pieces and of a reduction that is scattered; once two others."""
    found = hlo.traffic(hlo.parse(TEXT), chips=8)
    assert found.calls == {"all-gather": 5, "reduce-scatter": 5, "collective-permute": 1, "all-reduce": 1}
    whole, part = 64 * 8 * 2, 16 * 8 * 2
    assert found.sent == {
        "all-gather": 5 * whole * 3 / 4,
        "reduce-scatter": 5 * whole * 3 / 4,
        "collective-permute": part,
        "all-reduce": 2 * part / 2,
    }


def test_collectives_of_a_compiled_loop():
    """A column of the activations is summed over "tensor" once a layer."""
    mesh = cpu_mesh(CELL)
    sharded = lambda spec: NamedSharding(mesh, spec)

    def run(x, up, down):
        layer = lambda x, w: (jnp.tanh(x @ w[0]) @ w[1], None)
        return jax.lax.scan(layer, x, (up, down))[0]

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 16), (6, 16, 32), (6, 32, 16))]
    specs = (P(FSDP), P(None, None, TENSOR), P(None, TENSOR, None))
    step = jax.jit(run, in_shardings=tuple(map(sharded, specs)), out_shardings=sharded(P(FSDP)))
    found = hlo.traffic(hlo.parse(step.lower(*shapes).compile().as_text()), CELL.chips)
    assert found.calls == {"all-reduce": 6}
    assert found.sent["all-reduce"] == 6 * (8 // 4 * 16 * 4)


def test_chunks_of_tokens_gather_the_head_once():
    """However many chunks there are, the head is gathered before them."""
    mesh = cpu_mesh(CELL)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((32, 16), (4, 8, 16))]
    tokens = jax.ShapeDtypeStruct((4, 8), jnp.int32)

    def gathered_bytes(chunk):
        def loss(head, hidden, tokens):
            params = {"embed_tokens": {"weight": head}}
            return jnp.sum(map_logits(steps.objectives.cross_entropy, params, hidden, tokens, chunk=chunk))

        specs = P(TENSOR, FSDP), P(FSDP), P(FSDP)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            sharded = tuple(NamedSharding(mesh, spec) for spec in specs)
            low = jax.jit(jax.grad(loss), in_shardings=sharded).lower(*shapes, tokens)
        return hlo.traffic(hlo.parse(low.compile().as_text()), CELL.chips).sent["all-gather"]

    assert gathered_bytes(chunk=2) == gathered_bytes(chunk=8) > 0


@pytest.mark.parametrize(
    ("method", "lora"),
    [
        (BUDGET, True),
        pytest.param(LOOKAHEAD, False, marks=pytest.mark.slow),
        pytest.param(EXACT, False, marks=pytest.mark.slow),
    ],
)
def test_steps_on_eight_devices(method, lora):
    """Sharded and donated, a step moves what is trained, keeps its dtypes and turns nothing into NaN."""
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    compiled = lowered(TINY, CELL._replace(lora=lora), cpu_mesh(CELL), method)[0].compile(quickly)
    trained, frozen = some_parts(TINY, lora)
    state = METHODS[method](TINY).init(trained)
    batch = Batch(frozen, some_tokens(TINY, CELL.fsdp * CELL.sequences, CELL.time))
    expected = jax.jit(in_one_pass(TINY))(trained, batch)
    before = jax.tree.map(lambda x: np.asarray(x, np.float32), trained)
    placed = jax.device_put((trained, state, batch), compiled.input_shardings[0])
    new, state, found = compiled(*placed)
    # A budget's floor is -inf as long as it is unknown.
    assert not any(np.any(np.isnan(np.asarray(leaf, np.float32))) for leaf in jax.tree.leaves((new, state)))
    assert all(np.all(np.isfinite(np.asarray(leaf, np.float32))) for leaf in jax.tree.leaves(new))
    np.testing.assert_allclose(found.forget, expected.forget, rtol=1e-2)
    np.testing.assert_allclose(found.retain, expected.retain, rtol=1e-2)
    matrix = lambda tree: tree["adapter"]["q_proj"].up if lora else tree["base"]["lm_head"]["weight"]
    assert np.any(np.asarray(matrix(new), np.float32) != matrix(before))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(placed[2]))
    width = jnp.float32 if lora else jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(width)}
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == matrix(new).shape]
    assert len(moments) >= 2
    for moment in moments:
        assert moment.dtype == jnp.float32
        assert moment.sharding.is_equivalent_to(matrix(new).sharding, moment.ndim)


def test_moments_lie_like_their_parameters():
    """What an optimiser holds for a matrix is split as the matrix is, and the rest is everywhere."""
    trained = jax.eval_shape(lambda: initial_parts(TINY, False, jax.random.key(0))).trained
    state = jax.eval_shape(METHODS[BUDGET](TINY).init, trained)
    mesh = cpu_mesh(CELL)
    (adam,) = [s for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s)]
    (split,) = [s for s in jax.tree.leaves(shardings(state, mesh), is_leaf=is_adam) if is_adam(s)]
    assert split.mu == split.nu == shardings(trained, mesh)
    assert split.mu["base"]["layers"]["mlp"]["up_proj"]["weight"].spec == P(None, TENSOR, FSDP)
    assert adam.count.ndim == 0
    assert split.count.spec == P()


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


def test_records_resume_and_report(tmp_path):
    """A finished cell is not compiled again, and one that does not compile is shown with its reason."""
    cells = [CELL, CELL._replace(topology="v5p:2x2x2")]
    path = tmp_path / "records.jsonl"
    found = measure(TINY, CELL, PLAIN, cpu_mesh) | {"parameters": count_parameters(TINY)}
    assert found["hbm"] > found["arguments"] > 0
    with open_records(path) as records:
        records.get((*CELL, PLAIN), lambda: found)
        records.get((*CELL, LAGGED), lambda: found | {"hbm": 2 * found["hbm"]})
        records.get((*cells[1], EXACT), lambda: {"error": "no such topology", "parameters": 1})
    with open_records(path) as records:
        records.get((*CELL, PLAIN), lambda: pytest.fail("compiled again"))
        report.write_report(tmp_path, records.by_key, cells, {"tiny": TINY}, {"name": "scaling"})
    rows = read_csv(tmp_path / "rows.csv")
    assert list(rows["hbm ratio"][:2]) == [1, 2]
    assert list(rows["flops"][:2]) == pytest.approx([found["flops"]] * 2, rel=1e-5)
    assert "no such topology" in (tmp_path / "tables.md").read_text()


def test_without_the_compiler(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(ValueError, match="scaling"):
        prepare()
