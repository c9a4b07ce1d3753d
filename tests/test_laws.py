"""The laws of every net, in each way that it can be called: what stands in padding, in later tokens or in other rows changes nothing."""

import pytest
import torch
from torch.testing import assert_close

from cloche import files
from cloche.config import Port
from cloche.nets import NETS

V, B = 11, 4
IMAGE, SOUND, TOKENS = Port("image", (1, 8, 8)), Port("series", (None, 5)), Port("tokens", (16,), V)
PORTS = {
    "maps": (IMAGE, Port("vector", (3,), 3)),
    "streams": (SOUND, Port("tokens", (None,), V)),
    "continues": (TOKENS, TOKENS),
    "pairs": (TOKENS, TOKENS),
    "denoises": (IMAGE, IMAGE),
    "embeds": (TOKENS, Port("memory", (None, None))),
}
SMALL = {
    "mlp": {"widths": (6,)},
    "cnn": {"stages": ((4,), (6,)), "hidden": 5},
    "resnet": {"width": 4, "blocks": (1, 2)},
    **dict.fromkeys(("rnn", "lstm", "gru"), {"width": 6}),
    "seq2seq": {"width": 6},
    "transformer": {"width": 8, "heads": 2},
    "gpt": {"width": 8, "heads": 2, "layers": 2},
    "textenc": {"width": 8},
    "unet": {"width": 8, "heads": 2, "text": {"width": 8}},
}
CASES = [(kind, face, SMALL[kind]) for kind, config in NETS.items() for face in config.faces]
CASES += [("gru", "maps", {"width": 6, "layers": 2, "both": True}), ("lstm", "streams", {"width": 6, "both": True, "stack": 3})]
LENGTHS = {"streams": ("x", "lengths"), "pairs": ("source", "source_len"), "embeds": ("tokens", "lengths")}  # padded, how far it is real
FUTURE = {"streams": "x", "continues": "tokens", "pairs": "target"}  # what is read from front to end


def of(*faces):
    chosen = [c for c in CASES if c[1] in faces or not faces]
    return pytest.mark.parametrize("kind, face, keys", chosen, ids=["-".join((k, f, *map(str, s.values()))) for k, f, s in chosen])


def net_of(kind, face, keys, seed=0):
    """Weights that are nowhere zero, as some are at first."""
    torch.manual_seed(seed)
    net = NETS[kind].model_validate({"kind": kind, **keys}).build(*PORTS[face], face).eval()
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return net


def rows_of(face, dtype=torch.float64):
    torch.manual_seed(1)
    x, tokens, mask = torch.randn(B, 18, 5, dtype=dtype), torch.randint(3, V, (2, B, 12)), torch.tensor([[1, 1, 1]] * 3 + [[1, 1, 0]]) > 0
    return {
        "maps": {"x": torch.randn(B, 1, 8, 8, dtype=dtype)},
        "streams": {"x": x, "lengths": torch.tensor([18, 11, 6, 1])},
        "continues": {"tokens": tokens[0]},
        "pairs": {"source": tokens[0], "source_len": torch.tensor([12, 7, 4, 1]), "target": tokens[1]},
        "denoises": {"x": torch.randn(B, 1, 8, 8, dtype=dtype), "level": torch.linspace(-4, 4, B, dtype=dtype)}
        | {"memory": torch.randn(B, 3, 8, dtype=dtype), "mask": mask},
        "embeds": {"tokens": tokens[0], "lengths": torch.tensor([12, 7, 1, 0])},
    }[face]


def run(net, face, rows):
    """(B, …), with zeros where a row has come to its end."""
    if face in ("maps", "continues"):
        out = net(*rows.values())
        return out[0] if face == "continues" else out
    if face == "streams":
        y, n = net(**rows)
        return y * (torch.arange(y.shape[1]) < n[:, None])[..., None]
    if face == "embeds":
        y, mask = net(**rows)
        return y * mask[..., None]
    return net(rows["x"], rows["level"], (rows["memory"], rows["mask"])) if face == "denoises" else net(**rows)


@of()
def test_a_row_gives_the_same_in_any_batch(kind, face, keys):
    net, rows = net_of(kind, face, keys), rows_of(face, torch.float32)
    whole, order = run(net, face, rows), torch.tensor([2, 0, 3, 1])
    assert_close(run(net, face, {k: v[order] for k, v in rows.items()}), whole[order], rtol=1e-5, atol=1e-5)
    for i in range(B):
        assert_close(run(net, face, {k: v[i : i + 1] for k, v in rows.items()}), whole[i : i + 1], rtol=1e-5, atol=1e-5)
    assert (whole[0] - whole[1]).abs().max() > 1e-3  # else all of this would say nothing


@of(*LENGTHS)
def test_padding_changes_nothing(kind, face, keys):
    net, rows, (name, lengths) = net_of(kind, face, keys).double(), rows_of(face), LENGTHS[face]
    whole, x = run(net, face, rows), rows[name]
    beyond = torch.arange(x.shape[1]) >= rows[lengths][:, None]
    other = torch.where(beyond[..., None] if x.ndim == 3 else beyond, x.roll(1, 0) + 1 if x.ndim == 3 else (x + 1) % V, x)
    assert not torch.equal(other, x)
    assert_close(run(net, face, rows | {name: other}), whole, rtol=0, atol=1e-10)
    longer = run(net, face, rows | {name: torch.cat([x, x[:, :6]], 1)})
    assert_close(longer[:, : whole.shape[1]], whole, rtol=0, atol=1e-10)
    assert (longer[:, whole.shape[1] :] == 0).all()


@of("denoises")
def test_a_masked_place_of_the_memory_changes_nothing(kind, face, keys):
    net, rows = net_of(kind, face, keys).double(), rows_of(face)
    other = torch.where(rows["mask"][..., None], rows["memory"], 9.0)
    assert_close(run(net, face, rows | {"memory": other}), run(net, face, rows), rtol=0, atol=1e-10)


@of(*FUTURE)
def test_the_future_changes_nothing_before_it(kind, face, keys):
    net, rows, name = net_of(kind, face, keys).double(), rows_of(face), FUTURE[face]
    rows |= {"lengths": torch.full((B,), 18)} if face == "streams" else {}
    other = rows[name].clone()
    other[:, 6:] = other[:, 6:].flip(0)
    before, after = run(net, face, rows), run(net, face, rows | {name: other})
    seen = (before - after).abs().amax((0, 2))
    at = -(-6 // keys.get("stack", 1))
    assert seen[at:].max() > 1e-3
    assert (seen[:at].max() < 1e-10) == (not keys.get("both", False))  # but for cells that read from the end


@of("continues", "pairs")
def test_with_a_cache_as_without(kind, face, keys):
    net, rows = net_of(kind, face, keys).double(), rows_of(face)
    whole, tokens = run(net, face, rows), rows[FUTURE[face]]
    memory = net.encode(rows["source"], rows["source_len"]) if face == "pairs" else ()
    for sizes in ([1] * 12, [5, 1, 6]):
        carry, parts = net.start(B, 12, memory) if memory else net.start(B, 12), []
        for piece in tokens.split(sizes, 1):
            logits, carry = net.decode(piece, memory, carry) if memory else net(piece, carry)
            parts.append(logits)
        assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


@of()
def test_saved_and_loaded_it_gives_the_same_bits(kind, face, keys, tmp_path):
    net, other, rows = net_of(kind, face, keys), net_of(kind, face, keys, seed=2), rows_of(face, torch.float32)
    before = run(net, face, rows)
    assert not torch.equal(run(other, face, rows), before)
    files.durable_write(tmp_path / "net.safetensors", files.tensor_file(net.state_dict(), {}))
    other.load_state_dict(files.read_tensors(tmp_path / "net.safetensors")[0])
    assert torch.equal(run(other, face, rows), before)
