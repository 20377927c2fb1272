"""Which of PyTorch's attention kernels may run. PyTorch prefers cuDNN on Hopper and later, where
it is enabled."""

import pytest
import torch
import torch.nn.functional as F
from harness import ROOT

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


def test_a_cpu_is_left_alone():
    with kv_cache.decoding_attention(torch.device('cpu')):
        assert 'cudnn' in enabled()


def test_attention_is_called_in_one_place():
    """A kernel that is chosen there is chosen for training, generation and evaluation."""
    paths = [*ROOT.glob('*.py'), *ROOT.glob('engine/**/*.py')]
    found = [path.name for path in paths
             if 'scaled_dot_product_attention(' in path.read_text(encoding='utf-8')]
    assert found == ['attention.py']
