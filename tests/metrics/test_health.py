"""Network health: numbers against slow formulas, and training that does not notice."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from harness import CAN_FORK, script_settings

import train
from engine.distributed import Environment
from engine.errors import UserError
from engine.metrics import health
from engine.metrics.health import HealthMonitor
from engine.training import optim, parallel
from engine.training.run import BatchSchedule, Progress, Run
from engine.training.settings_checks import check_training
from model import GPT, GPTConfig

SHAPE = dict(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_embd=32)
OTHER = dict(position='rotary', qk_norm=True, n_kv_head=2, activation='swiglu', norm='rmsnorm_gain',
             embedding_norm=True, tied=False)
ALIBI = dict(position='alibi', activation='relu2', norm='rmsnorm')


class Place:
    """A run of one tiny model with a monitor, and the records that the monitor writes."""

    def __init__(self, name='adamw', interval=1, lr=1e-2, compile_with=None, clip=1.0, **changes):
        torch.manual_seed(0)
        self.model = GPT(GPTConfig(**{**SHAPE, **changes}))
        self.block_size = 16
        self.env = Environment(torch.device('cpu'), 'float32', False, 0, 0, 1, '')
        if compile_with:
            wrapped = torch.compile(self.model, backend=compile_with)
        else:
            wrapped = parallel.wrap(self.model, self.env)

        self.records = []
        writer = SimpleNamespace(write=self.write)
        optimizer = optim.build(name, self.model, lr, 0.1, (0.9, 0.95), lr)
        scaler = torch.amp.GradScaler('cpu', enabled=False)
        self.run = Run(self.model, wrapped.train(), optimizer, scaler, BatchSchedule(1, 3, 16, 1),
                       clip, 1, Progress(), writer=writer)
        self.monitor = HealthMonitor(self.run, self, self.env, interval)

    def write(self, iteration, **numbers):
        self.records.append((iteration, numbers))

    def batch(self, seed, stream, first, count):
        """As TokenDataset.batch, of tokens drawn for each sequence by its number."""
        windows = []
        for i in range(first, first + count):
            windows.append(torch.randint(50, (17,), generator=torch.Generator().manual_seed(i)))
        windows = torch.stack(windows)
        return windows[:, :-1], windows[:, 1:]

    def step(self):
        iteration = self.run.progress.iter_num
        batches = iter([(*self.batch(1, 'train', self.run.progress.sequences, 3), 1.0)])
        step = train.train_step(self.run, batches, self.env)
        self.run.count_iteration()
        self.monitor.report(iteration, step['grad_norm'].item())

    def value(self, layer, quantity, index=-1):
        return self.records[index][1][f'health/{layer}/{quantity}']


def layer_of(name):
    """'transformer.h.0.attn.c_attn.weight' is in 'h.0'."""
    parts = name.removeprefix('transformer.').split('.')
    return '.'.join(parts[:2]) if parts[0] == 'h' else parts[0]


def group_norms(tensors):
    """{layer: norm} of {name: tensor}, number by number in float64."""
    squares = {}
    for name, tensor in tensors.items():
        layer = layer_of(name)
        squares[layer] = squares.get(layer, 0.0) + tensor.double().square().sum().item()
    return {layer: math.sqrt(square) for layer, square in squares.items()}


@pytest.mark.parametrize('name, changes', [
    ('adamw', {}), ('adamw', OTHER), ('muon', ALIBI), ('muon', {})])
def test_norms_are_those_of_the_weights_before_and_after_a_step(name, changes):
    """An AdamW exists beforehand, as its class then calls the hooks from within Muon's step too."""
    place = Place('adamw')
    place = Place(name, **changes)
    place.step()
    before = {n: p.detach().clone() for n, p in place.model.named_parameters()}
    gradients = {}

    def keep_gradients(*_):
        gradients.update((n, p.grad.clone()) for n, p in place.model.named_parameters())
    place.run.optimizer.register_step_pre_hook(keep_gradients)
    place.step()
    after = {n: p.detach() for n, p in place.model.named_parameters()}

    weights = group_norms(after)
    changes = group_norms({n: after[n] - before[n] for n in after})
    expected = group_norms(gradients)
    assert len(place.records) == 2 and weights.keys() >= {'wte', 'h.0', 'h.1'}
    total = math.sqrt(sum(norm ** 2 for norm in expected.values()))
    assert total == pytest.approx(1.0, rel=1e-3)                # clipped
    for layer in weights:
        assert place.value(layer, 'weight_norm') == pytest.approx(weights[layer], rel=1e-5)
        assert place.value(layer, 'grad_norm') == pytest.approx(expected[layer], rel=1e-5)
        ratio = changes[layer] / weights[layer]
        assert place.value(layer, 'update_ratio') == pytest.approx(ratio, rel=1e-4)


@pytest.mark.parametrize('queries', [range(16), range(0, 16, 4)], ids=['all', 'some'])
@pytest.mark.parametrize('changes', [{}, OTHER, ALIBI], ids=['gpt2', 'rotary', 'alibi'])
def test_attention_and_activations_are_those_of_an_ordinary_forward_pass(
        changes, queries, monkeypatch):
    """Scores from what the model passes to PyTorch's attention, entropy by torch.distributions."""
    monkeypatch.setattr(health, 'MAX_QUERIES', len(queries))
    place = Place(lr=0.05, **changes)
    for _ in range(3):
        place.step()

    seen = []
    attention = F.scaled_dot_product_attention

    def recorded_attention(q, k, v, mask=None, **options):
        seen.append((q, k, mask))
        return attention(q, k, v, mask, **options)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', recorded_attention)

    x, _ = place.batch(1, 'train', 2 * 3, 3)
    with torch.no_grad():
        place.model.eval()(x)
        outputs = [place.model.transformer.wte(x)]
        for i, block in enumerate(place.model.transformer.h):
            q, k, mask = seen[i]
            keys = k.repeat_interleave(4 // k.size(1), 1)
            scores = torch.einsum('bhqd,bhkd->bhqk', q, keys)[:health.MAX_ATTENDED] / math.sqrt(8)
            if mask is not None:
                scores = scores + mask
            else:
                scores = scores.masked_fill(~torch.ones(16, 16).tril().bool(), -math.inf)

            largest = scores[:, :, queries].max().item()
            assert place.value(f'h.{i}', 'attention_logit') == pytest.approx(largest, rel=1e-4)
            entropies = []
            for t in queries:
                weights = torch.distributions.Categorical(logits=scores[:, :, t, :t + 1])
                entropies.append(weights.entropy())
            entropy = torch.stack(entropies).mean().item()
            assert place.value(f'h.{i}', 'attention_entropy') == pytest.approx(entropy, rel=1e-4)

            handle = block.register_forward_hook(lambda _, inputs, output: outputs.append(output))
            place.model(x)
            handle.remove()

    for layer, output in zip(('wte', 'h.0', 'h.1'), outputs):
        rms = math.sqrt((output.double() ** 2).mean())
        assert place.value(layer, 'activation_rms') == pytest.approx(rms, rel=1e-5)
        largest = output.abs().max().item()
        assert place.value(layer, 'activation_max') == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize('changes', [dict(bias=True), dict(OTHER, bias=True)])
def test_dead_units_are_counted(changes):
    place = Place(lr=1e-6, **changes)
    bias = place.model.transformer.h[1].mlp.c_fc.bias
    with torch.no_grad():
        bias[:24] = -1e3                                        # of the gate's units, with a gate
        bias[-1 if place.model.config.gated else 0] = -1e3      # a value, which kills nothing
    place.step()
    assert place.value('h.0', 'dead_units') < 0.02
    share = 24 / place.model.config.mlp_width
    assert place.value('h.1', 'dead_units') == pytest.approx(share, abs=0.02)


# Warnings

def warnings_in(lines):
    return [line for line in lines if line.startswith('warning')]


def test_a_cause_is_warned_of_once(logged):
    place = Place(lr=5.0)
    for _ in range(6):
        place.step()
    first, second = warnings_in(logged)
    assert 'update / weight' in first and 'largest logit' not in first
    assert 'largest logit' in second and 'update / weight' not in second
    logits = [place.value(f'h.{i}', 'attention_logit', n) for i in (0, 1) for n in range(6)]
    assert max(logits) > 50


def test_clipped_steps_are_counted_over_the_last_hundred(logged):
    place = Place(interval=50, lr=1e-4, clip=0.5)
    flags = []
    for i in range(251):                        # all that are measured are clipped, and 100 to 199
        flags.append(i % 50 == 0 or 100 <= i < 200)
        if i % 50 == 0:
            place.step()
        else:
            place.run.count_iteration()
            place.monitor.report(i, 0.6 if flags[i] else 0.1)

    assert [i for i, _ in place.records] == [0, 50, 100, 150, 200, 250]
    for i, numbers in place.records:
        last = flags[max(0, i - 99):i + 1]
        assert numbers['health/clipped'] == pytest.approx(sum(last) / len(last))
    warning, = warnings_in(logged)
    assert warning.startswith('warning: iteration 150: 51% of the last 100 steps were clipped; ')


def test_a_healthy_run_and_layers_that_start_from_zero_are_not_warned_of(logged):
    place = Place(lr=1e-3, tied=False, zero_init=True, clip=0.0)
    for _ in range(5):
        place.step()
    assert place.value('lm_head', 'update_ratio') > 0.1
    assert not warnings_in(logged)

    table = logged[-9:]
    assert len(logged) == 5 * 9 and table[0].startswith('health at iteration 4')
    title, low, lowest, _, high, highest = table[1].rsplit(None, 5)
    layers = ('wte', 'wpe', 'h.0', 'h.1', 'ln_f', 'lm_head')
    norms = {layer: place.value(layer, 'weight_norm') for layer in layers}
    assert title.strip() == 'weight norm'
    assert lowest == min(norms, key=norms.get) and highest == max(norms, key=norms.get)
    assert float(low) == pytest.approx(norms[lowest], rel=1e-2)
    assert float(high) == pytest.approx(norms[highest], rel=1e-2)


# Training does not notice

def test_a_compiled_model_is_not_compiled_again():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    place = Place(compile_with=backend)
    plain = Place()
    for _ in range(4):
        place.step()
        plain.step()
    assert len(compiled) == 1 and len(place.records) == 4
    for layer, quantity in (('h.1', 'weight_norm'), ('h.1', 'attention_entropy'),
                            ('wte', 'activation_rms'), ('h.0', 'dead_units')):
        expected = pytest.approx(plain.value(layer, quantity), rel=1e-4)
        assert place.value(layer, quantity) == expected


def split(records):
    """(those of training, those of health)."""
    training = [record for record in records if 'health/clipped' not in record]
    found = [record for record in records if 'health/clipped' in record]
    return training, found


@pytest.mark.parametrize('ranks', [1, 2])
def test_a_run_is_the_same_to_the_bit_with_and_without(trained, ranks):
    if ranks > 1 and not CAN_FORK:
        pytest.skip('two ranks are started by fork')
    trained.train(f'out-unwatched{ranks}', ranks=ranks)
    shown = trained.train(f'out-watched{ranks}', '--health_interval=5', ranks=ranks).stdout
    training, found = split(trained.records(f'out-watched{ranks}'))
    assert training == trained.records(f'out-unwatched{ranks}')
    assert [r['iter'] for r in found] == [0, 5, 10, 15]
    assert shown.count('health at iteration') == 4

    watched, unwatched = (
        torch.load(trained.folder / f'out-{name}{ranks}' / 'state.pt', weights_only=True)['model']
        for name in ('watched', 'unwatched'))
    assert all(torch.equal(watched[name], unwatched[name]) for name in unwatched)


def test_a_resumed_run_logs_each_measurement_once(trained):
    """With the numbers of one long run, the share of clipped steps over the last hundred too."""
    resume = ['--out_dir=out-stopped', '--init_from=resume', '--device=cpu']
    trained.train('out-measured', '--health_interval=2')
    trained.train('out-stopped', '--health_interval=2', '--max_iters=10')
    folder = trained.folder / 'out-stopped'
    shutil.copy(folder / 'state.pt', folder / 'kept')
    trained.run('train.py', *resume, '--max_iters=15')
    shutil.copy(folder / 'kept', folder / 'state.pt')   # as after a kill: the log is ahead
    trained.run('train.py', *resume, '--max_iters=20')

    _, found = split(trained.records('out-stopped'))
    _, expected = split(trained.records('out-measured'))
    assert found == expected
    assert 0 < expected[-1]['health/clipped'] < 1


@pytest.mark.parametrize('flag, words', [
    ('--strategy=fsdp',
     'health_interval measures whole layers, .*try --health_interval=0, or --strategy=ddp'),
    ('--health_interval=-1', 'health_interval=-1 should be at least 0')])
def test_what_cannot_be_measured_is_refused(flag, words):
    with script_settings(train, '--health_interval=10'):
        check_training(vars(train))
    with pytest.raises(UserError, match=words):
        with script_settings(train, '--health_interval=10', flag):
            check_training(vars(train))
