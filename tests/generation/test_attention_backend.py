"""Which of PyTorch's attention kernels may run. PyTorch prefers cuDNN on Hopper and later, where
it is enabled."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from harness import ROOT

from engine import attention
from engine.generation import generate, kv_cache
from model import GPT, GPTConfig

BACKENDS = ('cudnn', 'flash', 'mem_efficient', 'math')


def enabled():
    return {name for name in BACKENDS if getattr(torch.backends.cuda, f'{name}_sdp_enabled')()}


@pytest.fixture
def calls(monkeypatch):
    """The backends that were enabled at each call of attention, in models that take this CPU for
    a GPU."""
    found = []
    attention = F.scaled_dot_product_attention
    context = kv_cache.decoding_attention

    def spy(q, *arguments, **options):
        found.append((q.size(2), enabled()))
        return attention(q, *arguments, **options)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', spy)
    monkeypatch.setattr(generate, 'decoding_attention',
                        lambda device: context(torch.device('cuda')))
    return found


@pytest.mark.parametrize('options', [{}, dict(exact_window=True)])
def test_generation_on_a_gpu_never_chooses_cudnn(calls, options):
    """It would build a plan for every length of the cache."""
    model = GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=16)).eval()
    before = enabled()
    with torch.no_grad():
        # beyond block_size
        tokens = model.generate(torch.zeros(1, 3, dtype=torch.long), 20, **options)
    assert tokens.shape == (1, 23) and len(calls) == 40
    assert {length for length, _ in calls} >= {3, 1 if not options else 16}
    assert all(backends == {'flash', 'mem_efficient', 'math'} for _, backends in calls)
    assert enabled() == before                          # also between the tokens of stream()


def test_training_may_choose_cudnn(calls):
    assert 'cudnn' in enabled()
    model = GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=16))
    model(torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long))[1].backward()
    assert len(calls) == 2 and all('cudnn' in backends for _, backends in calls)


def test_the_caller_of_stream_keeps_its_backends(calls):
    model = GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=1, n_head=2, n_embd=16)).eval()
    before = enabled()
    for _ in model.stream(torch.zeros(1, 3, dtype=torch.long), 3):
        assert enabled() == before


MASKS = {
    'none': None,
    'causal': None,
    'of keys': torch.arange(6)[None] < 4,                                   # (1, S)
    'bias of heads': torch.linspace(-1, 1, 24).view(1, 4, 1, 6),            # (1, H, 1, S)
    'of sequences': torch.tensor([[3], [6]]).gt(torch.arange(6))[:, None, None],    # (B, 1, 1, S)
}


@pytest.mark.parametrize('n_queries', [1, 6])
@pytest.mark.parametrize('name', MASKS)
def test_grouped_queries_without_a_kernel_for_them(name, n_queries, monkeypatch):
    """Against each head by itself. PyTorch is never asked for groups, and one query repeats no
    key."""
    asked = []
    kernel = F.scaled_dot_product_attention

    def spy(q, k, v, *arguments, enable_gqa, **options):
        asked.append((k.size(1), enable_gqa))
        return kernel(q, k, v, *arguments, **options)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', spy)
    monkeypatch.setattr(attention, 'has_grouped_kernel', lambda q, mask: False)

    q = torch.randn(2, 4, n_queries, 8)
    k = torch.randn(2, 2, 6, 8)
    v = torch.randn(2, 2, 6, 8)
    mask = MASKS[name]
    is_causal = name == 'causal'
    found = attention.attention(q, k, v, mask, is_causal)

    scores = torch.stack([q[:, i] @ k[:, i // 2].mT for i in range(4)], dim=1) / 8 ** 0.5
    if is_causal:
        scores += torch.full((n_queries, 6), -torch.inf).triu(1)
    elif mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1)
    expected = torch.stack([weights[:, i] @ v[:, i // 2] for i in range(4)], dim=1)
    torch.testing.assert_close(found, expected)
    n_heads = 2 if n_queries == 1 and not is_causal else 4
    assert asked == [(n_heads, False)]


@pytest.mark.parametrize('capability, dtype, mask, expected', [
    ((9, 0), torch.bfloat16, None, True),
    ((9, 0), torch.float32, None, False),
    ((9, 0), torch.bfloat16, torch.ones(1), False),
    ((7, 5), torch.float16, None, False),
])
def test_only_flash_attention_has_a_kernel_for_groups(
        capability, dtype, mask, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: capability)
    q = SimpleNamespace(device=torch.device('cuda'), dtype=dtype)
    assert attention.has_grouped_kernel(q, mask) is expected


def test_a_compiled_model_takes_the_answer_about_flash_attention_as_a_constant(monkeypatch):
    asked = []

    def capability():
        asked.append(True)
        return (9, 0)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', capability)

    @torch.compile(backend='eager', fullgraph=True)
    def compiled(x):
        return x + 1 if attention.has_flash_attention() else x
    for _ in range(2):
        assert compiled(torch.zeros(1)) == 1
    assert len(asked) == 1


def test_a_cpu_is_left_alone():
    with kv_cache.decoding_attention(torch.device('cpu')):
        assert 'cudnn' in enabled()


def test_attention_is_called_in_one_place():
    """A kernel that is chosen there is chosen for training, generation and evaluation."""
    paths = [*ROOT.glob('*.py'), *ROOT.glob('engine/**/*.py')]
    found = [path.name for path in paths
             if 'scaled_dot_product_attention(' in path.read_text(encoding='utf-8')]
    assert found == ['attention.py']
