"""Writing text: which token is taken, what is remembered, and that no character is ever shown by halves."""

import pytest
import torch

from cloche.config import Port
from cloche.decode.text import continue_text, pick, stream
from cloche.errors import UserError
from cloche.nets.attention import attend
from cloche.nets.gpt import GptConfig
from cloche.nets.rnn import RnnConfig
from cloche.training.precision import Precision, bf16_is_native

pytestmark = pytest.mark.usefixtures("one_thread")
LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0]).log_softmax(0)  # p = 0.0871, 0.6439, 0.2369, 0.0321
V = 11


def shares(temperature, top_k=0, top_p=1.0, n=40_000):
    ids = pick(LOGITS.expand(n, 4), temperature, top_k, top_p, torch.Generator().manual_seed(0))
    return (torch.bincount(ids, minlength=4) / n).tolist()


@pytest.mark.parametrize(
    "how, wanted",
    [
        ((1.0,), [0.0871, 0.6439, 0.2369, 0.0321]),
        ((2.0,), [0.1674, 0.4551, 0.2760, 0.1015]),  # ∝ √p
        ((0.5,), [0.0159, 0.8650, 0.1171, 0.0021]),  # ∝ p²
        ((1.0, 2), [0, 0.7311, 0.2689, 0]),  # 0.6439 and 0.2369 of 0.8808
        ((1.0, 1), [0, 1, 0, 0]),
        ((1.0, 9), [0.0871, 0.6439, 0.2369, 0.0321]),  # more than there are
        ((1.0, 0, 0.7), [0, 0.7311, 0.2689, 0]),  # 0.6439 is less than 0.7: one more
        ((1.0, 0, 0.64), [0, 1, 0, 0]),  # reached by the likeliest alone
        ((1.0, 0, 1e-9), [0, 1, 0, 0]),  # always at least one
        ((1.0, 3, 0.9), [0.0900, 0.6652, 0.2447, 0]),  # both limits: the tighter counts
    ],
)
def test_the_shares_of_many_draws_are_those_worked_out_by_hand(how, wanted):
    assert shares(*how) == pytest.approx(wanted, abs=0.01)
    assert [s == 0 for s in shares(*how)] == [w == 0 for w in wanted]


def test_temperature_0_takes_the_likeliest_and_the_seed_decides_the_rest():
    rows = torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pick(rows, 0, 0, 1.0, torch.Generator()), rows.argmax(1))
    draw = lambda seed: pick(rows.expand(5, V), 1.0, 0, 1.0, torch.Generator().manual_seed(seed)).tolist()  # noqa: E731
    assert draw(1) == draw(1) and len({tuple(draw(seed)) for seed in range(9)}) > 1


def net(kind: str, context: int = 16):
    torch.manual_seed(0)
    config = GptConfig(width=16, layers=2, heads=2) if kind == "gpt" else RnnConfig(kind="lstm", width=16)
    made = config.build(Port("tokens", (context,), V), Port("tokens", (context,), V), "continues").eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return made


def written(made, prompt, limit, temperature=0.0, seed=0):
    return list(continue_text(made, prompt, limit, temperature, 0, 1.0, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("kind", ["gpt", "lstm"])
def test_from_its_memory_it_writes_what_it_would_write_reading_all_again(kind):
    made, prompt = net(kind), torch.tensor([[3, 1, 4]])
    tokens = prompt
    for _n in range(12):
        tokens = torch.cat([tokens, made(tokens)[0][:, -1:].argmax(2)], 1)
    assert written(made, prompt, 12) == tokens[0, 3:].tolist()
    assert written(made, prompt, 12, 1.0, 5) == written(made, prompt, 12, 1.0, 5) != written(made, prompt, 12, 1.0, 6)


def test_where_the_context_ends_it_goes_on_from_the_newer_half():
    made, tokens = net("gpt", 8), torch.tensor([[3, 1, 4, 1, 5, 9]])
    said = written(made, tokens, 9)
    for n in range(9):
        seen = tokens if tokens.shape[1] <= 8 else tokens[:, {9: -4, 10: -5, 11: -6, 12: -7, 13: -8, 14: -4}[tokens.shape[1]] :]
        assert int(made(seen)[0][0, -1].argmax()) == said[n]
        tokens = torch.cat([tokens, torch.tensor([[said[n]]])], 1)


def test_a_prompt_over_the_context_is_refused_with_both_numbers():
    with pytest.raises(UserError, match="the prompt is longer than the net's context\n  17 tokens, .* looks back over 16"):
        written(net("gpt"), torch.ones(1, 17, dtype=torch.int64), 1)
    assert len(written(net("gpt"), torch.ones(1, 16, dtype=torch.int64), 2)) == 2
    assert len(written(net("lstm"), torch.ones(1, 50, dtype=torch.int64), 2)) == 2


def test_text_comes_piece_by_piece_and_never_half_a_character():
    raw = "aé日😀z".encode()
    single = list(stream(iter(raw), lambda ids: bytes(ids)))
    assert single == ["a", "é", "日", "😀", "z"]
    pairs = {n: raw[n : n + 2] for n in range(0, len(raw), 2)}
    assert "".join(stream(iter(pairs), lambda ids: pairs[ids[0]])) == "aé日😀z"
    assert list(stream(iter(b"a\xe6\x97"), lambda ids: bytes(ids))) == ["a", "\ufffd"]  # it ends within one
    assert list(stream(iter(b"\xffb"), lambda ids: bytes(ids))) == ["\ufffd", "b"]


@pytest.mark.parametrize("kind", ["gpt", "lstm"])
def test_packed_for_writing_a_net_answers_as_before_and_keeps_its_state(kind):
    made, tokens, cpu = net(kind), torch.tensor([[3, 1, 4, 1, 5, 9]]), torch.device("cpu")
    state = {k: t.clone() for k, t in made.state_dict().items()}
    with torch.inference_mode(), Precision("bf16").autocast(cpu):
        plain = made(tokens)[0], written(made, tokens, 9)
        Precision("fp32").pack(made, cpu)
        assert torch.equal(made(tokens)[0], plain[0])  # nothing to do in float32
        Precision("bf16").pack(made, cpu)
        packed = made(tokens)[0], written(made, tokens, 9)
    assert packed[0].dtype == torch.bfloat16 and ("logits" in vars(made.embed)) == bf16_is_native(cpu)
    torch.testing.assert_close(packed[0], plain[0], rtol=2**-7, atol=2**-7)
    assert packed[1] == plain[1]
    assert state.keys() == made.state_dict().keys() and all(torch.equal(t, state[k]) for k, t in made.state_dict().items())


def test_one_query_sees_what_the_fused_kernel_shows_it():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=g) for n in (1, 7, 7))
    mask = torch.arange(7)[None, None, None] <= torch.tensor([2, 6])[:, None, None, None]
    with torch.no_grad():
        found = attend(q, k, v, mask)
    torch.testing.assert_close(found, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))
