"""The scaling study's own pieces, on the CPU: its model, its steps, and how it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.scaling import hlo, report
from experiments.scaling.compile import Cell, lowered, measure, prepare
from experiments.scaling.flops import flops_of
from experiments.scaling.model import (
    FSDP,
    SIZES,
    TENSOR,
    Size,
    count_parameters,
    initial_parameters,
    next_token_losses,
)
from experiments.scaling.steps import (
    EXACT,
    LAGGED,
    LOOKAHEAD,
    METHODS,
    PLAIN,
    Batch,
    in_two_passes,
)
from experiments.shared.records import open_records
from experiments.shared.report import read_csv

TINY = Size(layers=2, width=16, heads=4, kv_heads=2, hidden=24, vocabulary=32)
CELL = Cell("tiny", "v5e:2x4", fsdp=4, tensor=2, sequences=1, time=8)


def cpu_mesh(cell):
    devices = np.array(jax.devices()[: cell.chips]).reshape(cell.fsdp, cell.tensor)
    return Mesh(devices, (FSDP, TENSOR))


def test_parameter_counts():
    """7B and 70B are Llama 2's own counts."""
    counts = {name: count_parameters(size) for name, size in SIZES.items()}
    assert counts["7B"] == 6_738_415_616
    assert counts["70B"] == 68_976_648_192
    assert counts["0.1B"] == pytest.approx(0.13e9, rel=0.05)
    assert counts["1B"] == pytest.approx(1.1e9, rel=0.05)


def naive_loss(size, params, tokens):
    """The same decoder, a layer, a sequence and a head at a time."""
    norm = lambda x, scale: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale
    half = size.head_width // 2
    angle = np.arange(tokens.shape[1] - 1)[:, None] * 10_000.0 ** (-np.arange(half) / half)

    def rotate(x):
        z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], -1)

    losses = []
    for row in tokens:
        x = params["embed"][row[:-1]]
        for layer in range(size.layers):
            block = {name: leaf[layer] for name, leaf in params["blocks"].items()}
            y = norm(x, block["attention_norm"])
            heads = lambda name, y=y, b=block: np.split(y @ b[name], b[name].shape[1] // size.head_width, 1)
            keys, values, mixed = heads("key"), heads("value"), []
            for i, query in enumerate(heads("query")):
                pair = i * size.kv_heads // size.heads
                scores = rotate(query) @ rotate(keys[pair]).T / np.sqrt(size.head_width)
                scores = np.exp(scores - scores.max()) * np.tri(len(scores))
                mixed.append(scores / scores.sum(1, keepdims=True) @ values[pair])
            x = x + np.concatenate(mixed, 1) @ block["out"]
            y = norm(x, block["feed_forward_norm"])
            gate = y @ block["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (y @ block["up"])) @ block["down"]
        logits = norm(x, params["norm"]) @ params["head"]
        picked = logits[np.arange(len(logits)), row[1:]]
        losses += list(np.log(np.exp(logits).sum(1)) - picked)
    return np.mean(np.reshape(losses, (len(tokens), -1)), 1)


def test_loss_is_that_of_a_naive_decoder(x64):
    params = initial_parameters(TINY, jax.random.key(0), jnp.float64)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, TINY.vocabulary)
    expected = naive_loss(TINY, jax.tree.map(np.asarray, params), np.asarray(tokens))
    got = jax.jit(lambda params: next_token_losses(TINY, params, tokens))(params)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_causal():
    """The last token is only predicted, and without the later ones nothing depends on them."""
    params = initial_parameters(TINY, jax.random.key(0), jnp.float32)
    tokens = jnp.arange(9)[None]

    @jax.jit
    def gradient(embed):
        return jax.grad(lambda embed: next_token_losses(TINY, params | {"embed": embed}, tokens)[0])(embed)

    @jax.jit
    def of_first_half(embed):
        loss = lambda embed: next_token_losses(TINY, params | {"embed": embed}, tokens[:, :5])[0]
        return jax.grad(loss)(embed)

    used = lambda g: np.flatnonzero(np.abs(np.asarray(g(params["embed"]))).sum(1)).tolist()
    assert used(gradient) == list(range(8))
    assert used(of_first_half) == list(range(4))


def test_flops_by_hand():
    """Forward, all recomputed but the last product of a block, scores once more, and twice that backward."""
    batch, time = 2, 8
    attention = 2 * 2 * time * TINY.width
    linear = 2 * TINY.width * (2 * TINY.width + 2 * TINY.kv_heads * TINY.head_width + 3 * TINY.hidden)
    forward = batch * time * (TINY.layers * (linear + attention) + 2 * TINY.width * TINY.vocabulary)
    params = initial_parameters(TINY, jax.random.key(0))
    tokens = jnp.zeros((batch, time + 1), int)
    loss = lambda params: next_token_losses(TINY, params, tokens).sum()
    assert flops_of(jax.make_jaxpr(loss)(params).jaxpr) == forward
    spared = batch * time * TINY.layers * 2 * TINY.width * TINY.hidden
    scores = batch * time * TINY.layers * attention // 2
    assert flops_of(jax.make_jaxpr(jax.value_and_grad(loss))(params).jaxpr) == 4 * forward - spared + scores


def test_flops_of_an_unrolled_program():
    """What XLA counts where there is no loop that it would count once."""
    size = Size(layers=2, width=64, heads=2, kv_heads=2, hidden=128, vocabulary=256)
    params = initial_parameters(size, jax.random.key(0), jnp.float32)
    tokens = jnp.zeros((2, 33), int)
    loss = lambda params: next_token_losses(size, params, tokens, unroll=True).sum()
    counted = jax.jit(loss).lower(params).compile().cost_analysis()["flops"]
    assert flops_of(jax.make_jaxpr(loss)(params).jaxpr) == pytest.approx(counted, rel=0.1)


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


@pytest.mark.parametrize("method", [LOOKAHEAD, EXACT])
def test_steps_on_eight_devices(method):
    """Sharded and donated, a step moves the parameters, keeps its dtypes and turns nothing into NaN."""
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    compiled = lowered(TINY, CELL, cpu_mesh(CELL), method)[0].compile(quickly)
    params = initial_parameters(TINY, jax.random.key(0))
    state = METHODS[method](TINY).init(params)
    batch = Batch(*jax.random.randint(jax.random.key(1), (2, 4, 9), 0, TINY.vocabulary))
    expected = jax.jit(in_two_passes(TINY))(params, batch)
    before = np.asarray(params["head"], np.float32)
    new, state, losses = compiled(*jax.device_put((params, state, batch), compiled.input_shardings[0]))
    assert all(np.all(np.isfinite(np.asarray(leaf, np.float32))) for leaf in jax.tree.leaves((new, state)))
    assert np.any(np.asarray(new["head"], np.float32) != before)
    np.testing.assert_allclose(losses, expected, rtol=1e-2)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 0]
    assert len(moments) == 2 * len(jax.tree.leaves(new))
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}
    for moment in (leaf for leaf in moments if leaf.shape == new["head"].shape):
        assert moment.sharding.is_equivalent_to(new["head"].sharding, 2)


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
