"""Inference with a loaded checkpoint: results do not depend on batching, and the KV cache changes no token."""

import json
import math

import pytest
import small_checkpoints
import torch
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.checkpoint.state_dict import load_state
from titan_cpt.cli import main
from titan_cpt.common.run_folder import MANIFEST_FILE
from titan_cpt.errors import CheckpointError, DataError
from titan_cpt.evaluation.checkpoint_paths import stage_ends
from titan_cpt.evaluation.generate import Sampling, _choose, generate
from titan_cpt.evaluation.inference import loglikelihoods
from titan_cpt.models.build import build_model
from titan_cpt.models.common.kv_cache import CachedAttention, kv_cache

PROMPTS = [list(text.encode()) for text in ("The dog", "a", "An answer is", "The dog", "x" * 50)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A function that returns an imported checkpoint of each attention variant, created on first use."""
    made = {}

    def checkpoint(name):
        if name not in made:
            made[name] = small_checkpoints.imported(tmp_path_factory.mktemp(name), name)
        return made[name]

    return checkpoint


def plain(checkpoint, name):
    """The plain model with the checkpoint's weights."""
    model = build_model(small_checkpoints.SPECS[name])
    load_state(checkpoint, model, None)
    return model


def greedily(model, prompt, tokens):
    """Greedy generation without a KV cache."""
    with torch.no_grad():
        for _ in range(tokens):
            prompt = [*prompt, int(model(torch.tensor([prompt]))[0, -1].argmax())]
    return prompt


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("name", small_checkpoints.SPECS)
def test_the_kv_cache_changes_no_token(name, checkpoints):
    """Prompts of 1 to 50 tokens in one batch, each continued as if by itself and without a cache."""
    model = plain(checkpoints(name), name)
    ours = generate(small_checkpoints.load(checkpoints(name)), PROMPTS, max_new_tokens=14)
    slow = [greedily(model, prompt, 14)[len(prompt) :] for prompt in PROMPTS]

    assert ours == [tokens[: tokens.index(256)] if 256 in tokens else tokens for tokens in slow]


@pytest.mark.parametrize("name", small_checkpoints.SPECS)
def test_logits_with_a_kv_cache_equal_those_without(name, checkpoints):
    """Two sequences of different lengths, three tokens at once and then one: every logit within 1e-4."""
    opening = small_checkpoints.load(checkpoints(name))
    model, tokens = opening.model, torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([5, 8])
    with torch.no_grad(), kv_cache(model, sequences=2, capacity=12, device=torch.device("cpu")) as cache:
        model(tokens[:, :8])
        cache.advance(lengths)
        three = model(torch.stack([tokens[row, start : start + 3] for row, start in enumerate(lengths.tolist())]))
        cache.advance(torch.tensor([3, 3]))
        cache.select_rows(torch.tensor([1]))
        one = model(tokens[1:, 11:])
    with torch.no_grad():
        whole = model(tokens)

    torch.testing.assert_close(three, torch.stack([whole[0, 5:8], whole[1, 8:11]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(one[0, 0], whole[1, 11], atol=1e-4, rtol=0)


def test_the_model_is_restored_after_the_kv_cache(checkpoints):
    """Attention's own module is back, also after an error."""
    model = small_checkpoints.load(checkpoints("llama")).model
    within = []

    def fail():
        with kv_cache(model, sequences=1, capacity=2, device=torch.device("cpu")):
            within.extend(module for module in model.modules() if isinstance(module, CachedAttention))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert len(within) == 2
    assert not any(isinstance(module, CachedAttention) for module in model.modules())


@pytest.mark.parametrize("batch_tokens", [1, 60, 8192])
def test_a_loglikelihood_is_the_sum_of_log_probabilities(batch_tokens, checkpoints):
    """Computed from the model's logits, for any batching; the same input twice, and a truncated context."""
    opening = small_checkpoints.load(checkpoints("gpt_neox"), batch_tokens=batch_tokens, max_length=20)
    pairs = [([1, 2], [3]), ([1, 2], [4]), ([1], [2, 3]), (list(range(40)), [5, 6, 7]), ([9], [8] * 20), ([1, 2], [3])]
    expected = []
    for context, continuation in pairs:
        tokens = (context + continuation)[-21:]
        with torch.no_grad():
            logits = opening.model(torch.tensor([tokens[:-1]]))[0, -len(continuation) :].double()
        picked = logits.log_softmax(-1)[range(len(continuation)), continuation]
        expected.append((float(picked.sum()), bool((logits.argmax(-1) == torch.tensor(continuation)).all())))
    found = loglikelihoods(opening, pairs)

    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_the_most_likely_continuation_is_greedy(checkpoints):
    """With another last token it is not."""
    opening = small_checkpoints.load(checkpoints("gpt_neox"))
    (written,) = generate(opening, [PROMPTS[0]], max_new_tokens=5)
    other = [*written[:-1], (written[-1] + 1) % 256]

    assert [greedy for _, greedy in loglikelihoods(opening, [(PROMPTS[0], written), (PROMPTS[0], other)])] == [
        True,
        False,
    ]


def test_bfloat16_is_near_float32(checkpoints):
    """Weights and products in bfloat16 change a token's log-probability by less than 0.1 nats."""
    pairs = [(PROMPTS[2], PROMPTS[1]), (PROMPTS[1], PROMPTS[2])]
    exact = loglikelihoods(small_checkpoints.load(checkpoints("gpt_neox")), pairs)
    rough = loglikelihoods(small_checkpoints.load(checkpoints("gpt_neox"), precision="bfloat16"), pairs)

    for (context_and, continuation), (one, _), (other, _) in zip(pairs, exact, rough, strict=True):
        assert context_and
        assert 0 < abs(one - other) < 0.1 * len(continuation)


def test_a_continuation_beyond_the_longest_input_is_refused(checkpoints):
    """It is not scored in part, and no generated text is shorter than requested."""
    opening = small_checkpoints.load(checkpoints("gpt_neox"), max_length=8)

    with pytest.raises(DataError, match="9 tokens; the longest input of this model is 8"):
        loglikelihoods(opening, [([1], [2] * 9)])
    with pytest.raises(DataError, match="leave no room"):
        generate(opening, [[1]], max_new_tokens=8)


def test_sampling_depends_only_on_seed_and_prompt(checkpoints):
    """By itself, in a batch, in another order: the same text; another seed gives another."""
    opening = small_checkpoints.load(checkpoints("llama"), batch_tokens=100)
    drawn = Sampling(temperature=1.5, top_p=0.9, seed=3)
    together = generate(opening, PROMPTS, max_new_tokens=10, sampling=drawn)
    apart = [generate(opening, [prompt], max_new_tokens=10, sampling=drawn)[0] for prompt in reversed(PROMPTS)]
    other = generate(opening, PROMPTS, max_new_tokens=10, sampling=Sampling(1.5, 0.9, seed=4))

    assert together == apart[::-1]
    assert together != other


@given(st.lists(st.floats(-4, 4), min_size=3, max_size=9), st.floats(0.05, 1), st.integers(0, 2**20))
def test_nucleus_sampling_draws_from_the_nucleus(logits, top_p, seed):
    """Never a token beyond the smallest set of most likely tokens that reaches top_p."""
    row = torch.tensor([logits], dtype=torch.float32)
    (token,) = _choose(row, Sampling(1.0, top_p, seed), [torch.Generator().manual_seed(seed)])
    likelier = row[0].double().softmax(-1)
    before = likelier[likelier > likelier[token]].sum()

    assert before < top_p + 1e-9


def test_samples_follow_the_probabilities():
    """4,000 samples from (0.5, 0.3, 0.2) with top_p 0.8: never the third token, the first 5/8 within 4 sigma."""
    row = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(4000, 3)
    draw = torch.Generator().manual_seed(0)
    chosen = torch.tensor(_choose(row, Sampling(1.0, 0.79), [draw] * 4000))
    share = (chosen == 0).double().mean().item()

    assert (chosen == 2).sum() == 0
    assert abs(share - 5 / 8) < 4 * math.sqrt(5 / 8 * 3 / 8 / 4000)


def test_generation_stops_when_stop_returns_true(checkpoints):
    """After the token for which it does."""
    (tokens,) = generate(
        small_checkpoints.load(checkpoints("gpt_neox")),
        [[65]],
        max_new_tokens=20,
        stop=lambda written: len(written) == 4,
    )

    assert len(tokens) == 4


def test_generate_on_the_command_line(checkpoints, capsys):
    """The prompt and its greedy continuation; the example texts are stored beside the checkpoint."""
    checkpoint = checkpoints("gpt_neox")
    words = ["--prompt", "The dog", "--tokens", "6", "--temperature", "0", "--tokenizer", "bytes", "--examples"]
    with pytest.raises(SystemExit) as left:
        main(["generate", str(checkpoint), *words])
    (tokens,) = generate(small_checkpoints.load(checkpoint), [PROMPTS[0]], max_new_tokens=6)
    kept_texts = json.loads((checkpoint.parent / "imported-evaluations" / "generations.json").read_text())["texts"]

    assert left.value.code == 0
    assert f"  The dog |{small_checkpoints.load(checkpoint).tokenizer.decode([t for t in tokens if t < 257])}" in (
        capsys.readouterr().out
    )
    assert [text["prompt"] for text in kept_texts[:1]] == ["Der Hund lief über die Straße, weil"]


def test_a_damaged_checkpoint_is_not_loaded(checkpoints, tmp_path, capsys):
    """Nor is a folder that is not a checkpoint: one message, exit status 2."""
    checkpoint = small_checkpoints.imported(tmp_path, "gpt_neox")
    victim = next(checkpoint.glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"!")

    with pytest.raises(CheckpointError, match="changed since it was saved"):
        small_checkpoints.load(checkpoint)
    with pytest.raises(CheckpointError, match=MANIFEST_FILE):
        stage_ends(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["generate", str(tmp_path), "--prompt", "a"])
    assert left.value.code == 2
    assert "CheckpointError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "x"], "give --prompt TEXT"),
        (["eval", "x"], "give --suite"),
        (["eval", "x", "--suite", "paper"], "unknown suite 'paper'"),
        (["eval", "x", "--suite", "paper_german", "--tasks", "piqa"], "piqa: not in suite paper_german"),
        (["eval", "x", "--tasks", "piqa:many"], "TASK:SHOTS"),
    ],
)
def test_a_command_line_error_is_reported(words, said, capsys):
    """Before anything is loaded, with exit status 2."""
    with pytest.raises(SystemExit) as left:
        main(words)

    assert left.value.code == 2
    assert said in capsys.readouterr().err
