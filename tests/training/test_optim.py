import copy
import math

import pytest
import torch
from harness import take_step

from engine.checkpoint import gathered, run_folder
from engine.checkpoint.contents import Checkpoint
from engine.errors import UserError
from engine.training import optim
from model import GPT, GPTConfig


def tiny_gpt(**changes):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
    return GPT(GPTConfig(**{**shape, **changes}))


def new_optimizer(model, learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95), name='adamw',
                  **muon):
    return optim.build(name, model, learning_rate, weight_decay, betas, muon_lr=0.02, **muon)


def scaler(enabled=False):
    return torch.amp.GradScaler('cpu', enabled=enabled)


def loss_of(model):
    idx = torch.arange(32).view(2, 16)
    return model(idx, idx + 1)[1]


def backward(model):
    loss_of(model).backward()


def spoil(value):
    """A hook that puts `value` into a gradient."""
    def hook(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient
    return hook


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
    for p in decayed['params']:
        assert names[id(p)].endswith('.weight')
        assert '.ln_' not in names[id(p)]
    biases_and_norms = {name for name in names.values() if name.endswith('.bias') or '.ln_' in name}
    assert {names[id(p)] for p in rest['params']} == biases_and_norms
    assert decayed['fused']
    assert rest['fused']


def test_the_optimizer_is_pytorchs():
    """Its weights and state are those of an AdamW built by hand, and the states fit each other."""
    model = tiny_gpt()
    a = new_optimizer(model)
    assert type(a) is torch.optim.AdamW

    reference = tiny_gpt()
    matrices = [p for p in reference.parameters() if p.dim() >= 2]
    vectors = [p for p in reference.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    b = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)

    for i in range(4):
        if i == 2:
            state_of_a = copy.deepcopy(a.state_dict())
            state_of_b = copy.deepcopy(b.state_dict())
            a.load_state_dict(state_of_b)
            b.load_state_dict(state_of_a)
        train(model, a, 1)
        train(reference, b, 1)
    assert same_weights(model, reference)
    assert str(a.state_dict()) == str(b.state_dict())


@pytest.mark.parametrize('grad_clip', [0.0, 0.3])
def test_a_step_clips_updates_and_clears(grad_clip):
    """Against clipping by the formula, and PyTorch's own AdamW."""
    model = tiny_gpt()
    optimizer = new_optimizer(model)
    optim.set_lr(optimizer, 3e-3)

    reference = tiny_gpt()
    reference_optimizer = new_optimizer(reference)
    for group in reference_optimizer.param_groups:
        group['lr'] = 3e-3

    for _ in range(3):
        norm = take_step(optimizer, loss_of(model), grad_clip)
        backward(reference)
        expected = math.sqrt(sum(p.grad.square().sum().item() for p in reference.parameters()))
        assert norm.item() == pytest.approx(expected, rel=1e-5)
        if grad_clip:
            for p in reference.parameters():
                p.grad *= min(1, grad_clip / expected)
        reference_optimizer.step()
        reference_optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())

    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('float16', [False, True])
@pytest.mark.parametrize('what', ['loss', 'gradient'])
@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_step_that_is_not_finite_changes_nothing(float16, what, name):
    """A GradScaler looks at gradients only, so with one a bad loss comes with bad gradients."""
    model = tiny_gpt()
    optimizer = new_optimizer(model, name=name)
    train(model, optimizer, 2)
    before = copy.deepcopy(model)
    moments = copy.deepcopy(optimizer.state_dict()['state'])

    # a step that is not finite
    loss_scaler = scaler(float16)
    loss_scaler.scale(torch.zeros(1))                   # sets up its scale
    loss = loss_of(model)
    hooks = []
    if what == 'loss':
        loss = loss + float('nan')                      # its gradients are finite
    if what == 'gradient' or float16:
        weight = model.transformer.h[0].attn.c_attn.weight
        hooks.append(model.transformer.ln_f.weight.register_hook(spoil(float('inf'))))
        hooks.append(weight.register_hook(spoil(float('nan'))))
    norm = take_step(optimizer, loss, scaler=loss_scaler)
    for hook in hooks:
        hook.remove()
    assert same_weights(model, before)
    for index, moment in optimizer.state_dict()['state'].items():
        for key, value in moments[index].items():
            if key != 'step':
                assert torch.equal(moment[key], value)
    assert what == 'loss' or not math.isfinite(norm)

    # and the next one goes on
    take_step(optimizer, loss_of(model), scaler=loss_scaler)
    assert not same_weights(model, before)


def saved_state(steps=3, name='adamw', **changes):
    model = tiny_gpt(**changes)
    optimizer = new_optimizer(model, name=name)
    train(model, optimizer, steps)
    contents = model.to_checkpoint()
    contents.update(iter_num=steps, best_val_loss=2.5, scaler=scaler().state_dict(),
                    optimizer=optimizer.state_dict())
    return model, optimizer, Checkpoint(**copy.deepcopy(contents))


@pytest.mark.parametrize('name, changes', [
    ('adamw', {}),
    ('muon', {}),
    ('muon', dict(activation='swiglu', n_kv_head=1, tied=False)),
])
def test_a_restored_optimizer_goes_on_as_an_uninterrupted_one(tmp_path, name, changes):
    model, optimizer, saved = saved_state(name=name, **changes)
    restored = copy.deepcopy(model)
    fresh = new_optimizer(restored, name=name)
    gathered.write(tmp_path / gathered.STATE, saved.to_payload())
    optim.load_state_dict(fresh, scaler(), run_folder.read_state(tmp_path / gathered.STATE))
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
    saved.scaler = dict(scaler(True).state_dict(), scale=1024.0)
    fresh = scaler(True)
    optim.load_state_dict(optimizer, fresh, saved)
    assert fresh.get_scale() == 1024.0


@pytest.mark.parametrize('changes', [dict(n_layer=1), dict(n_embd=64), dict(bias=False)])
@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_moments_of_another_model_are_refused(changes, name):
    saved = saved_state(name=name)[2]
    with pytest.raises(UserError, match='optimizer state'):
        optim.load_state_dict(new_optimizer(tiny_gpt(**changes), name=name), scaler(), saved)


@pytest.mark.parametrize('steps', [0, 3])
@pytest.mark.parametrize('saved_name, name', [('adamw', 'muon'), ('muon', 'adamw')])
def test_optimizers_are_not_mixed(saved_name, name, steps):
    saved = saved_state(steps, saved_name)[2]
    words = f'trained with optimizer={saved_name}, .* go on with --optimizer={saved_name}'
    with pytest.raises(UserError, match=words):
        optim.load_state_dict(new_optimizer(tiny_gpt(), name=name), scaler(), saved)


def with_moment(name, value):
    return lambda saved: saved.optimizer['state'][0].update({name: value})


def with_optimizer(value):
    return lambda saved: setattr(saved, 'optimizer', value)


@pytest.mark.parametrize('change, words', [
    (with_moment('exp_avg', torch.zeros(3, 3)), 'another shape'),
    (with_moment('exp_avg', 'no tensor'), 'not one of adamw'),
    (with_moment('step', torch.zeros(4)), 'not one of adamw'),
    (with_moment('step', 'three'), 'not one of adamw'),
    (with_optimizer({}), 'not one of adamw'),
    (with_optimizer({'state': {0: {}}, 'param_groups': []}),
     'of 0 weights, .* go on with the --freeze of the run'),
    (with_optimizer({'state': [], 'param_groups': 7}), 'not one of adamw'),
    (lambda saved: saved.optimizer['state'].popitem(), 'another shape'),
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
    saved = saved_state()[2]
    with_moment('exp_avg_sq', torch.zeros(1).expand(10 ** 6, 10 ** 6))(saved)
    torch.save(saved.to_payload(), tmp_path / 'state.pt')
    with pytest.raises(UserError, match='its tensors are larger than the file'):
        run_folder.load_state(tmp_path)


# Muon

def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match="optimizer='sgd' is unknown; try 'adamw' or 'muon'"):
        new_optimizer(tiny_gpt(), name='sgd')


def plain_newton_schulz(matrix):
    """One matrix at a time, in float32, by the published formula."""
    if len(matrix) > matrix.size(1):
        return plain_newton_schulz(matrix.t()).t()
    x = matrix / matrix.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.775 * x @ x.t() @ x + 2.0315 * x @ x.t() @ x @ x.t() @ x
    return x


def matrices_of(p, name, config):
    """The matrices that Muon should update each by itself."""
    if name.endswith('c_attn.weight'):
        kv_width = config.kv_heads * config.head_size
        return p.split([config.n_embd, kv_width, kv_width])
    if config.activation == 'swiglu' and name.endswith('c_fc.weight'):
        return p.chunk(2)
    return [p]


# the momentum at three iterations: it goes from 0.85 to the setting during the first 300
MOMENTA = {0: 0.85, 150: 0.9, 600: 0.95}
MOMENTA_TO_075 = {0: 0.85, 150: 0.8, 600: 0.75}
SWIGLU = dict(activation='swiglu', n_kv_head=1, position='rotary', tied=False, bias=False)


@pytest.mark.parametrize('changes, muon, momenta', [
    ({}, {}, MOMENTA),
    (SWIGLU, dict(muon_momentum=0.75), MOMENTA_TO_075),
])
def test_muon_updates_the_matrices_of_blocks_by_its_formula(changes, muon, momenta, monkeypatch):
    """And PyTorch's AdamW the rest. In float32: bfloat16 leaves an error of a few percent."""
    monkeypatch.setattr(optim, 'PRECISION', torch.float32)
    model = tiny_gpt(**changes)
    optimizer = new_optimizer(model, name='muon', **muon)

    # AdamW of another copy, for the rest
    reference = tiny_gpt(**changes)
    named = dict(reference.named_parameters())
    of_muon = [name for name, p in named.items() if '.h.' in name and p.dim() == 2]
    rest = [p for name, p in named.items() if name not in of_muon]
    groups = [dict(params=[p for p in rest if p.dim() == 2], weight_decay=0.1),
              dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, 5e-3, (0.9, 0.95))

    buffers = {name: torch.zeros_like(named[name]) for name in of_muon}
    for iteration, momentum in momenta.items():
        # one step of both, from the same weights
        before = copy.deepcopy(model)
        optim.set_lr(optimizer, 5e-3, iteration)    # half of the highest, so Muon's rate is 0.01
        backward(model)
        reference.load_state_dict(before.state_dict())
        backward(reference)
        optimizer.step()
        adamw.step()

        after = dict(model.named_parameters())
        for name, p in reference.named_parameters():
            if name not in of_muon:
                torch.testing.assert_close(after[name], p, rtol=1e-5, atol=1e-7)
                continue

            buffers[name] = momentum * buffers[name] + (1 - momentum) * p.grad
            nesterov = momentum * buffers[name] + (1 - momentum) * p.grad
            old = dict(before.named_parameters())[name].detach()
            parts = [matrices_of(x, name, model.config) for x in (after[name], old, nesterov)]
            for found, start, update in zip(*parts):
                rate = 0.01 * max(1, len(start) / start.size(1)) ** 0.5
                expected = -rate * plain_newton_schulz(update)
                moved = found.detach() - start * (1 - 0.01 * 0.1)
                assert (moved - expected).norm() < 1e-3 * expected.norm(), name
        model.zero_grad()
        reference.zero_grad()


def test_muon_agrees_with_pytorchs_where_a_weight_is_one_matrix(monkeypatch):
    """In bfloat16, as PyTorch's has it on every device."""
    monkeypatch.setattr(optim, 'precision_on', lambda device: torch.bfloat16)
    names = ('attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
    model = tiny_gpt()
    optimizer = new_optimizer(model, name='muon')
    reference = tiny_gpt()
    matrices = [p for name, p in reference.named_parameters() if name.endswith(names)]
    pytorchs = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95,
                                adjust_lr_fn='original')
    for _ in range(3):
        train(model, optimizer, 1)
        train(reference, pytorchs, 1)
        with torch.no_grad():                       # the next gradients should be the same again
            for (name, p), q in zip(model.named_parameters(), reference.parameters()):
                if name.endswith(names):
                    assert (p - q).abs().max() < 0.02 * 0.02, name
                q.copy_(p)


@pytest.mark.parametrize('precision, smallest', [(torch.bfloat16, 1e-3), (torch.float16, 1e-9)])
def test_newton_schulz_brings_singular_values_near_one(precision, smallest, monkeypatch):
    """In float16 too, where gradients below 6e-8 would be zero."""
    monkeypatch.setattr(optim, 'precision_on', lambda device: precision)
    x = torch.randn(4, 24, 96) * torch.tensor([smallest, 1.0, 30.0, 1e-20])[:, None, None]
    found = optim.orthogonalize(x).float()
    values = torch.linalg.svdvals(found[:3])
    assert values.min() > 0.6
    assert values.max() < 1.35

    # the direction is that of the orthogonal factor
    left, _, right = torch.linalg.svd(x[:3], full_matrices=False)
    exact = left @ right
    assert (found[:3] * exact).sum() / found[:3].norm() / exact.norm() > 0.95

    # tiny and zero matrices
    assert found.isfinite().all()
    assert optim.orthogonalize(torch.zeros(1, 4, 4)).eq(0).all()


@pytest.mark.parametrize('capability, precision', [
    ((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_gpu_without_bfloat16_takes_float16(capability, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert optim.precision_on(torch.device('cuda')) == precision


@pytest.mark.parametrize('has_bfloat16, precision', [
    (False, torch.float32), (True, torch.bfloat16)])
def test_a_cpu_without_bfloat16_takes_float32(has_bfloat16, precision, monkeypatch):
    monkeypatch.setattr(optim, 'cpu_multiplies_bfloat16', lambda: has_bfloat16)
    assert optim.precision_on(torch.device('cpu')) == precision


@pytest.mark.parametrize('ranks', [2, 3])
def test_each_rank_takes_an_equal_part_of_the_matrices(ranks, monkeypatch):
    """4 matrices over 3 ranks are 2, 2 and none."""
    x = torch.randn(4, 8, 12)
    expected = optim.orthogonalize(x)
    parts = []
    dist = optim.dist
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda: ranks)
    monkeypatch.setattr(dist, 'all_gather_into_tensor', lambda whole, own: parts.append(own))
    for rank in range(ranks):
        monkeypatch.setattr(dist, 'get_rank', lambda rank=rank: rank)
        assert optim.orthogonalize_on_ranks(x).shape == x.shape

    assert [len(part) for part in parts] == [2] * ranks
    torch.testing.assert_close(torch.cat(parts)[:4], expected)


def train_rank(rank, ranks, folder, changes):
    """Ten steps on this rank's share of 4 sequences.

    Saves the weights, and the losses of all ranks together.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank,
                                         world_size=ranks)
    model = tiny_gpt(**changes)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = new_optimizer(model, name='muon')
    batch = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(0))
    batch = batch.chunk(ranks)[rank]

    losses = []
    for iteration in range(10):
        optim.set_lr(optimizer, 1e-2, iteration)
        loss = wrapped(batch[:, :-1], batch[:, 1:])[1]
        take_step(optimizer, loss)
        loss = loss.detach() / ranks
        torch.distributed.all_reduce(loss)
        losses.append(loss)

    saved = dict(weights=model.state_dict(), losses=torch.stack(losses))
    torch.save(saved, f'{folder}/rank-{rank}')
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_muon_are_one(tmp_path):
    """With the options of a modern shape. The ranks keep the same weights to the bit."""
    changes = dict(position='rotary', norm='rmsnorm', activation='relu2', qk_norm=True,
                   embedding_norm=True, tied=False, bias=False, softcap=15.0, n_kv_head=1)
    found = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        arguments = (ranks, str(folder), changes)
        torch.multiprocessing.start_processes(train_rank, arguments, ranks, start_method='spawn')
        for rank in range(ranks):
            found.append(torch.load(folder / f'rank-{rank}', weights_only=True))

    one, first, second = found
    for name in one['weights']:
        assert torch.equal(first['weights'][name], second['weights'][name])
    torch.testing.assert_close(first['losses'], one['losses'], rtol=1e-4, atol=0)
    assert one['losses'][-1] < one['losses'][0] - 0.5
