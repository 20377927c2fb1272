"""The file format, from and to the family's tools. Faults are in test_faults.py."""

import copy

import pytest
import torch

import checkpoint
from model import GPT, GPTConfig


def trained_gpt(steps=3, **changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32), **changes}))
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95))
    train(model, optimizer, steps)
    return model, optimizer


def train(model, optimizer, steps):
    idx = torch.arange(32).view(2, 16)
    for _ in range(steps):
        model(idx, idx + 1)[1].backward()
        optimizer.step()
        optimizer.zero_grad()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def scaler():
    return torch.amp.GradScaler('cpu', enabled=False)


def test_a_restored_run_goes_on_as_the_one_that_never_stopped(tmp_path):
    model, optimizer = trained_gpt()
    checkpoint.save_state(tmp_path, model, optimizer, scaler(), iter_num=3, best_val_loss=2.5, fingerprint='f')
    train(model, optimizer, 4)
    state, notes = checkpoint.load_state(tmp_path)
    assert (state['iter_num'], state['best_val_loss'], state['fingerprint'], notes) == (3, 2.5, 'f', [])
    again = checkpoint.build_model(state)
    optimizer = again.configure_optimizers(0.1, 1e-2, (0.9, 0.95))
    checkpoint.restore_optimizer(optimizer, scaler(), state)
    train(again, optimizer, 4)
    assert same(model, again)


def test_a_loaded_model_does_not_hang_on_its_file(tmp_path):
    model, optimizer = trained_gpt()
    checkpoint.save_state(tmp_path, model, optimizer, scaler(), iter_num=3, best_val_loss=2.5)
    state = checkpoint.load_state(tmp_path)[0]
    again = checkpoint.build_model(state)
    with open(tmp_path / 'state.pt', 'r+b') as file:            # in place, as no save of ours would
        file.write(bytes(file.seek(0, 2) and 100000))
    assert same(model, again)


def test_ckpt_has_the_familys_keys_and_nothing_else_in_model_args(tmp_path):
    model, _ = trained_gpt()
    checkpoint.save_model(tmp_path, torch.compile(model)._orig_mod, iter_num=7, best_val_loss=1.5, config={}, tokenizer={})
    saved = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    assert {'model', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= saved.keys()
    assert saved['model_args'] == dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32, dropout=0.0, bias=True)
    assert 'transformer.h.1.mlp.c_proj.weight' in saved['model']
    assert not any('_orig_mod' in name for name in saved['model'])


def test_a_checkpoint_of_the_family_resumes_with_its_optimizer(tmp_path):
    """As its tools write it: compiled names, attention masks, a tensor for the loss, an unfused AdamW."""
    model, _ = trained_gpt(0, bias=False)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{'params': decay, 'weight_decay': 0.1}, {'params': rest, 'weight_decay': 0.0}],
                                  lr=1e-2, betas=(0.9, 0.95))
    train(model, optimizer, 3)
    weights = {f'_orig_mod.{name}': value for name, value in model.state_dict().items()}
    weights['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16).tril()
    torch.save(dict(model=weights, optimizer=optimizer.state_dict(), iter_num=3, best_val_loss=torch.tensor(2.5),
                    model_args=dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32, dropout=0.0, bias=False),
                    config=dict(dataset='shakespeare_char', batch_size=12)), tmp_path / 'ckpt.pt')
    state, notes = checkpoint.load_state(tmp_path)
    assert 'with the optimizer inside' in notes[0] and state['best_val_loss'] == 2.5
    again = checkpoint.build_model(state)
    assert again.config.activation == 'gelu'
    fused = again.configure_optimizers(0.1, 1e-2, (0.9, 0.95))
    checkpoint.restore_optimizer(fused, scaler(), state)
    train(model, optimizer, 5)
    train(again, fused, 5)
    for a, b in zip(model.parameters(), again.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_activation_of_gpt2_survives(tmp_path):
    model, _ = trained_gpt(activation='gelu_tanh')
    checkpoint.save_model(tmp_path, model, iter_num=7, best_val_loss=1.5)
    again = checkpoint.build_model(checkpoint.load_model(tmp_path))
    assert again.config == model.config and same(model, again)


def test_moments_are_cropped_with_the_context(tmp_path):
    model, optimizer = trained_gpt()
    checkpoint.save_state(tmp_path, model, optimizer, scaler(), iter_num=3, best_val_loss=2.5)
    state = checkpoint.load_state(tmp_path)[0]
    short = checkpoint.build_model(state)
    short.crop_block_size(8)
    fresh = short.configure_optimizers(0.1, 1e-2, (0.9, 0.95))
    checkpoint.restore_optimizer(fresh, scaler(), state)
    saved = optimizer.state[model.transformer.wpe.weight]['exp_avg']
    assert torch.equal(fresh.state[short.transformer.wpe.weight]['exp_avg'], saved[:8])


def test_typed_hyperparameters_win_over_saved_ones(tmp_path):
    model, optimizer = trained_gpt()
    checkpoint.save_state(tmp_path, model, optimizer, scaler(), iter_num=3, best_val_loss=2.5)
    other = copy.deepcopy(model).configure_optimizers(0.3, 5e-3, (0.8, 0.7))
    checkpoint.restore_optimizer(other, scaler(), checkpoint.load_state(tmp_path)[0])
    group = other.param_groups[0]
    assert (group['lr'], group['betas'], group['weight_decay']) == (5e-3, (0.8, 0.7), 0.3)


def test_moments_of_another_model_are_refused(tmp_path):
    model, optimizer = trained_gpt()
    checkpoint.save_state(tmp_path, model, optimizer, scaler(), iter_num=3, best_val_loss=2.5)
    state = checkpoint.load_state(tmp_path)[0]
    for changes in (dict(n_layer=1), dict(n_embd=64), dict(bias=False)):
        other = trained_gpt(0, **changes)[0].configure_optimizers(0.1, 1e-2, (0.9, 0.95))
        with pytest.raises(ValueError, match='optimizer state'):
            checkpoint.restore_optimizer(other, scaler(), state)
