from contextlib import contextmanager

import pytest
import torch

from engine import distributed
from engine.training import parallel
from model import GPT, GPTConfig


@pytest.mark.parametrize('compile', [False, True])
def test_a_wrapped_model_computes_the_same_with_the_same_weights(compile, monkeypatch):
    """The backend traces the model and runs it as it is, which takes no C compiler."""
    torch_compile = torch.compile

    def compile_by_tracing(model, **options):
        return torch_compile(model, backend='eager', **options)
    monkeypatch.setattr(torch, 'compile', compile_by_tracing)

    # the plain model
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32))
    idx = torch.randint(50, (2, 16))
    logits, loss = model(idx, idx)
    loss.backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    names = list(model.state_dict())

    # the wrapped one
    env = distributed.start_environment(device='cpu')
    env.compile = compile
    wrapped = parallel.wrap(model, env)
    with parallel.sync_gradients(wrapped, enabled=False):
        found = wrapped(idx, idx)[1]
        found.backward()

    torch.testing.assert_close(found, loss)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert list(model.to_checkpoint()['model']) == names        # without the prefixes of wrappers


def test_only_the_last_micro_step_waits_for_the_other_ranks():
    class Wrapped:
        """A model over several ranks, as far as synchronization goes."""
        is_synchronized = True

        @contextmanager
        def no_sync(self):
            self.is_synchronized = False
            yield
            self.is_synchronized = True

    wrapped = Wrapped()
    found = []
    for enabled in (False, False, True):
        with parallel.sync_gradients(wrapped, enabled):
            found.append(wrapped.is_synchronized)
    assert found == [False, False, True]
