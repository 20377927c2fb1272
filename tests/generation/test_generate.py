import pytest
import torch

from engine.errors import UserError
from engine.generation.generate import sample_token
from engine.generation.kv_cache import KVCache, StaticKVCache, new_caches
from model import GPT, GPTConfig


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)              # far from uniform, so that mistakes show
    return model


def uncached(model, idx, count):
    """Greedy continuation by the whole model over the whole window for every token."""
    for _ in range(count):
        logits, _ = model(idx[:, -model.config.block_size:])
        idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx


@pytest.mark.parametrize('length', [1, 7, 15, 16, 20])
def test_cached_text_is_uncached_text(model, length):
    idx = torch.randint(50, (3, length))
    expected = uncached(model, idx, 40)
    found = model.generate(idx, 40, temperature=0, exact_window=True)
    assert torch.equal(found, expected)
    within = max(0, 16 - length) + 1                    # tokens before the window has to move
    assert torch.equal(model.generate(idx, within, temperature=0), expected[:, :length + within])


@pytest.mark.parametrize('options', [
    dict(temperature=0),
    dict(temperature=0, exact_window=True),
    dict(temperature=0.8, top_k=20, repetition_penalty=1.5)])
def test_prompts_of_different_lengths_get_what_each_would_get_alone(model, options):
    """Also once the window has moved."""
    lengths = [5, 3, 9, 16]
    new = 20
    prompts = [torch.randint(50, (length,)) for length in lengths]
    noise = torch.rand(4, new)
    rest = torch.full((4, 13), -1)
    shifted = torch.zeros(4, 13 + new)
    for i, prompt in enumerate(prompts):
        rest[i, :len(prompt) - 3] = prompt[3:]
        shifted[i, len(prompt) - 3:len(prompt) - 3 + new] = noise[i]

    idx = torch.stack([prompt[:3] for prompt in prompts])
    together = model.generate(idx, 13 + new, noise=shifted, prompt_rest=rest, **options)
    for i, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], new, noise=noise[i:i + 1], **options)
        assert torch.equal(together[i, :len(prompt) + new], alone[0])


def test_cached_logits_are_uncached_logits(model):
    idx = torch.randint(50, (2, 16))
    kv_caches = new_caches(model, 2, 16)
    parts = [model.hidden(idx[:, :5], kv_caches)]
    parts += [model.hidden(idx[:, i:i + 1], kv_caches) for i in range(5, 16)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden(idx))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', [KVCache, StaticKVCache])
def test_16_bits_with_a_cache_are_as_near_as_without(model, dtype, kind):
    """To float32, over positions that a cache stores in another precision than the weights."""
    idx = torch.randint(50, (2, 16))
    exact = model.hidden(idx)
    model.to(dtype)
    kv_caches = new_caches(model, 2, 16, kind)
    assert kv_caches[0].keys.dtype == torch.float32
    parts = [model.hidden(idx[:, :5], kv_caches)]
    for i in range(5, 16):
        position = torch.tensor([i])
        for kv_cache in kv_caches:
            kv_cache.length = i
            kv_cache.position = position if kind is StaticKVCache else None
        parts.append(model.hidden(idx[:, i:i + 1], kv_caches, position))
    cached = torch.cat(parts, dim=1)
    assert cached.dtype == dtype
    assert (cached - exact).norm() < 1.5 * (model.hidden(idx) - exact).norm() < 0.05 * exact.norm()


def test_past_the_block_the_last_half_is_read_again(model):
    """At each refill, the next token is that of the last half of the block alone."""
    idx = torch.randint(50, (2, 16))
    found = model.generate(idx, 20, temperature=0)
    refills = range(17, 36, 9)              # 8 read again and 1 sampled, then 8 more fit
    for i in refills:
        assert torch.equal(found[:, i], uncached(model, found[:, i - 8:i], 1)[:, -1])


@pytest.mark.parametrize('backend', ['eager', 'inductor'])
def test_a_compiled_step_samples_the_same(model, backend, monkeypatch):
    """The first backend only traces the step, as one graph; the second also compiles it, where
    there is a compiler."""
    if backend == 'inductor':
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(1))
        except Exception as error:
            pytest.skip(f'no compiler here: {type(error).__name__}')
    idx = torch.randint(50, (2, 5))
    expected = model.generate(idx, 30, temperature=0)
    if backend == 'eager':
        torch_compile = torch.compile
        monkeypatch.setattr(torch, 'compile', lambda function, mode, **options: torch_compile(
            function, backend='eager', **options))
    torch._dynamo.reset()
    assert torch.equal(model.generate(idx, 30, temperature=0, compile=True), expected)


def test_samples_follow_the_softmax():
    logits = torch.randn(1, 6).expand(20000, 6)
    noise = torch.rand(20000, 1, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(sample_token(logits, 0.7, None, 1.0, noise), minlength=6) / 20000
    torch.testing.assert_close(counts, (logits[0] / 0.7).softmax(-1), atol=0.015, rtol=0)


@pytest.mark.parametrize('top_k, top_p, kept', [
    (2, 1.0, {1, 3}), (0, 0.75, {1, 3}), (0, 0.5, {3}), (3, 0.99, {1, 3, 0}),
    (100, 1.0, {0, 1, 2, 3, 4}), (1, 0.1, {3})])
def test_top_k_and_top_p_keep_the_likeliest(top_k, top_p, kept):
    probabilities = torch.tensor([[0.14, 0.25, 0.06, 0.5, 0.05]])
    noise = torch.linspace(0, 1 - 2 ** -24, 4000)[:, None]
    sampled = sample_token(probabilities.log().expand(4000, 5), 1.0, top_k, top_p, noise)
    assert set(sampled.tolist()) == kept


@pytest.mark.parametrize('temperature, top_k, top_p, min_p', [
    (1.0, 0, 1.0, 0.2), (0.7, 20, 0.9, 0.05), (1.5, 0, 0.5, 0.3), (1.0, 3, 1.0, 0.01),
    (2.0, 0, 1.0, 1.0)])
def test_the_kept_tokens_are_those_of_transformers(temperature, top_k, top_p, min_p):
    processors = pytest.importorskip('transformers').generation.logits_process
    logits = 2 * torch.randn(1, 60, generator=torch.Generator().manual_seed(0))
    expected = processors.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = processors.TopKLogitsWarper(top_k)(None, expected)
    expected = processors.TopPLogitsWarper(top_p)(None, expected)
    expected = processors.MinPLogitsWarper(min_p)(None, expected).softmax(-1)[0]
    noise = torch.linspace(0, 1 - 2 ** -24, 20000)[:, None]
    tokens = sample_token(logits.expand(20000, 60), temperature, top_k, top_p, noise, min_p)
    found = tokens.bincount(minlength=60) / 20000
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize('compile', [False, True])
@pytest.mark.parametrize('vocab_size', [None, 45])
def test_a_repetition_penalty_falls_on_all_text_so_far(model, compile, vocab_size, monkeypatch):
    """As in transformers, over the prompt, its part before the window, and what was sampled. Each
    call begins anew."""
    processors = pytest.importorskip('transformers').generation.logits_process
    processor = processors.RepetitionPenaltyLogitsProcessor(1.7)
    torch_compile = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda function, mode, **options: torch_compile(
        function, backend='eager', **options))
    torch._dynamo.reset()
    prompt = torch.randint(45, (2, 20))
    expected = prompt
    for _ in range(12):
        logits = model(expected[:, -16:])[0][:, -1, :vocab_size]
        token = processor(expected, logits).argmax(-1, keepdim=True)
        expected = torch.cat([expected, token], dim=1)
    options = dict(temperature=0, repetition_penalty=1.7, vocab_size=vocab_size, exact_window=True,
                   compile=compile)
    for _ in range(2):
        assert torch.equal(model.generate(prompt, 12, **options), expected)
    plain = model.generate(prompt, 12, **{**options, 'repetition_penalty': 1.0})
    assert not torch.equal(plain, expected)
    if compile:         # where the window does not move, and the compiled step is used
        prompt = prompt[:, :4]
        expected = model.generate(prompt, 10, **{**options, 'compile': False})
        assert torch.equal(model.generate(prompt, 10, **options), expected)


def test_padding_of_the_vocabulary_is_never_sampled(model):
    with torch.no_grad():
        model.lm_head.weight[40:] *= 20
    for temperature in (0, 1.0, 5.0):
        found = model.generate(torch.zeros(4, 1, dtype=torch.long), 60, temperature, vocab_size=40)
        assert found.max() < 40


def test_a_sample_does_not_depend_on_its_batch(model):
    noise = torch.rand(4, 12)
    idx = torch.tensor([[3, 1, 4]])
    together = model.generate(idx.expand(4, 3), 12, noise=noise)
    for i in range(4):
        assert torch.equal(model.generate(idx, 12, noise=noise[i:i + 1]), together[i:i + 1])


@pytest.mark.parametrize('options, words', [
    (dict(temperature=-1.0), 'temperature=-1.0'),
    (dict(temperature=float('nan')), 'temperature=nan'),
    (dict(top_k=-5), 'top_k=-5'), (dict(top_p=0.0), 'top_p=0.0'), (dict(top_p=1.5), 'top_p=1.5'),
    (dict(min_p=1.5), 'min_p=1.5'), (dict(repetition_penalty=0.0), 'repetition_penalty=0.0'),
    (dict(repetition_penalty=float('nan')), 'repetition_penalty=nan')])
def test_impossible_options_are_refused(model, options, words):
    with pytest.raises(UserError, match=words):
        model.generate(torch.zeros(1, 1, dtype=torch.long), 3, **options)


def test_the_smallest_temperature_takes_the_likeliest_token():
    logits = torch.randn(20, 50)
    for temperature in (1e-46, 1e-30, 1e-4):
        tokens = sample_token(logits, temperature, None, 1.0, torch.rand(20, 1))
        assert torch.equal(tokens, logits.argmax(-1))
