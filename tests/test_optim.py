import copy
import math

import pytest
import torch

from engine import optim
from engine.errors import UserError
from model import GPT, GPTConfig


def tiny_gpt(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32), **changes}))


def new_optimizer(model, learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95)):
    return optim.adamw(model, learning_rate, weight_decay, betas)


def scaler(enabled=False):
    return torch.amp.GradScaler('cpu', enabled=enabled)


def backward(model):
    idx = torch.arange(32).view(2, 16)
    loss = model(idx, idx + 1)[1]
    loss.backward()
    return loss.detach()


def train(model, optimizer, steps):
    for _ in range(steps):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize('bias', [True, False])
def test_decay_falls_on_matrices_and_embeddings_only(bias):
    model = tiny_gpt(bias=bias)
    decayed, rest = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu').param_groups
    assert (decayed['weight_decay'], rest['weight_decay']) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith('.weight') and '.ln_' not in names[id(p)] for p in decayed['params'])
    assert {names[id(p)] for p in rest['params']} == {n for n in names.values() if n.endswith('.bias') or '.ln_' in n}
    assert decayed['fused'] and rest['fused']


def test_the_optimizer_is_pytorchs():
    """Its weights and state are those of an AdamW built by hand, and the states fit each other."""
    model, reference = tiny_gpt(), tiny_gpt()
    a = new_optimizer(model)
    assert type(a) is torch.optim.AdamW
    b = torch.optim.AdamW([dict(params=[p for p in reference.parameters() if p.dim() >= 2], weight_decay=0.1),
                           dict(params=[p for p in reference.parameters() if p.dim() < 2], weight_decay=0.0)],
                          lr=1e-2, betas=(0.9, 0.95), fused=True)
    for i in range(4):
        if i == 2:
            state_of_a, state_of_b = copy.deepcopy(a.state_dict()), copy.deepcopy(b.state_dict())
            a.load_state_dict(state_of_b)
            b.load_state_dict(state_of_a)
        train(model, a, 1)
        train(reference, b, 1)
    assert same_weights(model, reference)
    assert str(a.state_dict()) == str(b.state_dict())


@pytest.mark.parametrize('grad_clip', [0.0, 0.3])
def test_a_step_clips_updates_and_clears(grad_clip):
    """Against clipping by the formula, and PyTorch's own AdamW."""
    model, reference = tiny_gpt(), tiny_gpt()
    optimizer, reference_optimizer = new_optimizer(model), new_optimizer(reference)
    optim.set_lr(optimizer, 3e-3)
    for group in reference_optimizer.param_groups:
        group['lr'] = 3e-3
    for _ in range(3):
        norm = optim.step(optimizer, scaler(), backward(model), grad_clip)
        backward(reference)
        expected = math.sqrt(sum(p.grad.square().sum().item() for p in reference.parameters()))
        assert norm.item() == pytest.approx(expected, rel=1e-5)
        for p in reference.parameters():
            p.grad *= min(1, grad_clip / expected) if grad_clip else 1
        reference_optimizer.step()
        reference_optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('float16', [False, True])
@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_a_step_that_is_not_finite_changes_no_weight(float16, what):
    """A GradScaler looks at gradients only; with one, a loss that is not finite has such gradients too."""
    model = tiny_gpt()
    before, optimizer = copy.deepcopy(model), new_optimizer(model)
    loss_scaler = scaler(float16)
    loss_scaler.scale(torch.zeros(1))                   # sets up its scale
    loss = backward(model)
    if what == 'loss':
        loss = loss * float('nan')
    if what == 'gradient' or float16:
        model.transformer.ln_f.weight.grad[0] = float('inf')
    norm = optim.step(optimizer, loss_scaler, loss, 1.0)
    assert same_weights(model, before)
    assert what == 'loss' or not math.isfinite(norm)
    optim.step(optimizer, loss_scaler, backward(model), 1.0)
    assert not same_weights(model, before)              # and the next one goes on


def saved_state(steps=3):
    model = tiny_gpt()
    optimizer = new_optimizer(model)
    train(model, optimizer, steps)
    return model, optimizer, copy.deepcopy(optim.state_dict(optimizer, scaler()))


def test_a_restored_optimizer_goes_on_as_an_uninterrupted_one():
    model, optimizer, saved = saved_state()
    restored = copy.deepcopy(model)
    fresh = new_optimizer(restored)
    optim.load_state_dict(fresh, scaler(), saved)
    train(model, optimizer, 3)
    train(restored, fresh, 3)
    assert same_weights(model, restored)


def test_moments_are_cropped_with_the_context():
    model, optimizer, saved = saved_state()
    short = copy.deepcopy(model)
    short.crop_block_size(8)
    fresh = new_optimizer(short)
    optim.load_state_dict(fresh, scaler(), saved)
    expected = optimizer.state[model.transformer.wpe.weight]['exp_avg']
    assert torch.equal(fresh.state[short.transformer.wpe.weight]['exp_avg'], expected[:8])


def test_new_hyperparameters_win_over_saved_ones():
    model, _, saved = saved_state()
    other = new_optimizer(copy.deepcopy(model), 5e-3, 0.3, (0.8, 0.7))
    optim.load_state_dict(other, scaler(), saved)
    group = other.param_groups[0]
    assert (group['lr'], group['betas'], group['weight_decay']) == (5e-3, (0.8, 0.7), 0.3)


def test_the_loss_scale_is_restored():
    model, optimizer, saved = saved_state()
    saved['scaler'] = dict(scaler(True).state_dict(), scale=1024.0)
    fresh = scaler(True)
    optim.load_state_dict(optimizer, fresh, saved)
    assert fresh.get_scale() == 1024.0


@pytest.mark.parametrize('changes', [dict(n_layer=1), dict(n_embd=64), dict(bias=False)])
def test_moments_of_another_model_are_refused(changes):
    saved = saved_state()[2]
    with pytest.raises(UserError, match='optimizer state'):
        optim.load_state_dict(new_optimizer(tiny_gpt(**changes)), scaler(), saved)


def with_moment(name, value):
    return lambda saved: saved['optimizer']['state'][0].update({name: value})


def with_optimizer(value):
    return lambda saved: saved.update(optimizer=value)


@pytest.mark.parametrize('change, words', [
    (with_moment('exp_avg', torch.zeros(3, 3)), 'another shape'),
    (with_moment('exp_avg', 'no tensor'), 'not one of AdamW'),
    (with_moment('step', torch.zeros(4)), 'not one of AdamW'),
    (with_moment('step', 'three'), 'not one of AdamW'),
    (with_optimizer({}), 'not one of AdamW'),
    (with_optimizer({'state': {0: {}}, 'param_groups': []}), 'not one of AdamW'),
    (with_optimizer({'state': [], 'param_groups': 7}), 'not one of AdamW'),
    (lambda saved: saved['optimizer']['state'].popitem(), 'another shape'),
])
def test_a_damaged_state_is_refused(change, words):
    model, _, saved = saved_state()
    change(saved)
    fresh = new_optimizer(model)
    before = str(fresh.state_dict())
    with pytest.raises(UserError, match=words):
        optim.load_state_dict(fresh, scaler(), saved)
    assert str(fresh.state_dict()) == before


def test_moments_larger_than_their_file_are_refused(tmp_path):
    """A tensor that repeats one number a trillion times."""
    from engine import run_folder
    model, _, saved = saved_state()
    with_moment('exp_avg_sq', torch.zeros(1).expand(10 ** 6, 10 ** 6))(saved)
    torch.save(dict(model.to_checkpoint(), **saved, iter_num=3, best_val_loss=2.5), tmp_path / 'state.pt')
    with pytest.raises(UserError, match='its tensors are larger than the file'):
        run_folder.load_state(tmp_path)
