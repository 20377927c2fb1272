import json
import re
from types import SimpleNamespace

import pytest
import torch
from harness import ROOT, script_settings

import bench
from engine.distributed import Environment
from engine.errors import RunError, UserError
from engine.tokenizer import Tokenizer
from model import GPT

SMALL = [
    '--device=cpu',
    '--n_layer=2',
    '--n_head=2',
    '--n_embd=32',
    '--block_size=32',
    '--batch_size=4',
    '--vocab_size=50',
    '--warmup_steps=2',
    '--steps=5',
]


def test_figures_agree_with_each_other(workspace):
    shown = workspace.run('bench.py', *SMALL, '--gradient_accumulation_steps=3').stdout
    ms, rate = re.search(r'this project +([\d.]+) ms.*, ([\d,.]+) tokens/s', shown).groups()
    tokens = 3 * 4 * 32
    assert float(rate.replace(',', '')) == pytest.approx(tokens / float(ms) * 1000, rel=0.02)
    assert 0 < float(re.search(r'mfu +([\d.]+)%', shown)[1]) < 100
    assert 0.05 < float(re.search(r'memory +([\d.]+)', shown)[1]) < 5


def test_the_step_is_that_of_training(workspace):
    """On real data, the losses are those that train.py logs at the same constant learning rate."""
    flags = ['--real_data=True', '--dataset=toy', '--warmup_steps=4', '--steps=2']
    shown = workspace.run('bench.py', *SMALL, *flags).stdout
    losses = re.search(r'loss +([\d.]+) first, ([\d.]+) last', shown).groups()
    found = [float(value) for value in losses]

    workspace.train('out-bench', '--dropout=0', '--gradient_accumulation_steps=1', '--batch_size=4',
                    '--max_iters=6', '--learning_rate=1e-4', '--min_lr=1e-4', '--decay_lr=False')
    logged = [r['loss'] for r in workspace.records('out-bench') if 'loss' in r]
    assert found == pytest.approx([logged[0], logged[-1]], abs=1e-4)


@pytest.mark.parametrize('work, dtype', [('train', 'bfloat16'), ('sample', 'float32')])
def test_it_runs_beside_transformers(workspace, work, dtype):
    pytest.importorskip('transformers')
    shown = workspace.run('bench.py', *SMALL, f'--bench={work}', '--compare=transformers',
                          f'--compare_dtype={dtype}', '--dtype=float32', '--prompt_tokens=5',
                          '--new_tokens=20').stdout

    assert f'transformers in {dtype}' in shown
    for name in ('this project', 'transformers'):
        assert float(re.search(rf'^{name} +([\d.]+) ms', shown, re.M)[1]) > 0
    assert re.search(r'ratio +[\d.]+ times', shown)


def test_generation_is_timed_against_the_memory_of_this_machine(workspace):
    shown = workspace.run('bench.py', *SMALL, '--bench=sample', '--prompt_tokens=5',
                          '--new_tokens=20', '--dtype=bfloat16').stdout
    assert re.search(r'this project +[\d.]+ ms.* tokens/s', shown)
    assert re.search(r'weights +[\d.]+ GB/s read, \d+% of', shown)


def test_batches_and_encoding_are_timed(toy, monkeypatch, capsys):
    """Once each: the command encodes 10 MB several times."""
    try:
        Tokenizer()
    except RunError as error:
        pytest.skip(str(error))

    time_interleaved = bench.time_interleaved

    def time_once(functions, warmup, repeats):
        return time_interleaved(functions, 0, 1)
    monkeypatch.setattr(bench, 'time_interleaved', time_once)

    flags = ['--bench=data', '--real_data=True', '--dataset=toy']
    with script_settings(bench, *SMALL, *flags) as overrides:
        bench.main(overrides)
    shown = capsys.readouterr().out
    assert re.search(r'batch +[\d.]+ ms.*GB/s', shown)
    assert shown.count('MB/s of text') == 2


def run_here(*flags):
    """bench.py's main with these flags, in this process."""
    with script_settings(bench, *flags) as overrides:
        bench.main(overrides)


def test_the_memory_of_generation_leaves_out_the_probe_of_the_bandwidth(monkeypatch, capsys):
    peaks = [3 * 2 ** 30]

    def probe(device):
        peaks.append(5 * 2 ** 30)
        return 1e9
    monkeypatch.setattr(bench.devices, 'memory_bandwidth', probe)
    monkeypatch.setattr(bench.devices, 'peak_memory', lambda device: max(peaks))
    run_here(*SMALL, '--bench=sample', '--prompt_tokens=2', '--new_tokens=2', '--figures=True')
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['memory_gib'] == 3


@pytest.mark.parametrize('waits, unread', [(False, 1), (True, 0)])
def test_a_gpu_runs_while_the_loss_before_is_read(monkeypatch, waits, unread):
    """As in train.py's log; but beside another model each step waits for its own loss."""
    losses = iter(range(10))
    monkeypatch.setattr(bench.train, 'train_step',
                        lambda *arguments: dict(loss=torch.tensor(float(next(losses)))))
    env = SimpleNamespace(device=torch.device('cuda'))
    step = bench.ProjectStep(SimpleNamespace(count_iteration=lambda: None), None, env, waits)
    for i in range(4):
        step()
        assert step.losses == list(range(i + 1 - unread))
    step.read_losses()
    assert step.losses == [0, 1, 2, 3]


# A plan

def plan(capsys, *flags):
    """(GB at the most, tokens/s, all that is printed) of a plan."""
    run_here(*flags)
    shown = capsys.readouterr().out
    gigabytes = float(re.search(r'memory +([\d.]+) GB', shown)[1])
    rate = float(re.search(r'speed +([\d,]+) tokens/s', shown)[1].replace(',', ''))
    return gigabytes, rate, shown


def test_a_plan_is_that_of_the_config_and_the_flags(capsys):
    flags = ['--plan=H100', '--config=train_gpt2_1558m', '--gpus=8']
    gigabytes, rate, shown = plan(capsys, *flags)
    assert gigabytes == pytest.approx(39.9, rel=0.01)
    assert 'a GPU of 48 GB has room' in shown
    assert 'calculated, not measured' in shown
    assert 'each GPU takes 32 times 4 x 1,024 tokens' in shown
    # 6 N + 12 layers x width x context operations for each token
    operations = 6 * (1_556_840_000 - 1024 * 1600) + 12 * 48 * 1600 * 1024
    assert rate == pytest.approx(8 * 0.4 * 989.4e12 / operations, rel=1e-3)
    assert max(map(len, shown.splitlines()[1:])) < 80

    smaller, slower, shown = plan(capsys, *flags, '--recompute=True', '--assumed_mfu=0.2')
    assert smaller == pytest.approx(31.6, rel=0.01)
    assert slower == pytest.approx(rate / 2, rel=1e-3)


def test_without_a_config_a_plan_is_of_the_step_that_is_timed(capsys):
    shown = plan(capsys, '--plan=T4', '--batch_size=6')[2]
    assert '1 x T4, float16' in shown
    assert 'each GPU takes 1 times 6 x 1,024 tokens' in shown


@pytest.mark.parametrize('name, gigabytes', [
    ('gpt2', 3), ('gpt2-medium', 8), ('gpt2-large', 16), ('gpt2-xl', 32)])
def test_finetuning_openai_s_weights_is_planned_by_their_name(capsys, name, gigabytes):
    found = plan(capsys, '--plan=A100', '--config=finetune_shakespeare', f'--init_from={name}')[0]
    assert gigabytes - 1 < found < gigabytes


def test_adapters_are_planned_and_timed_without_the_moments_of_what_they_adapt(capsys):
    flags = ['--plan=A100', '--config=finetune_shakespeare']
    whole, rate, _ = plan(capsys, *flags)
    small, faster, shown = plan(capsys, *flags, '--lora_rank=8')
    # what is frozen has 14 of its 16 bytes less, and a product less of three
    assert whole - small > 14 * 1.4
    assert faster / rate == pytest.approx(3 / 2, rel=0.1)
    assert max(map(len, shown.splitlines()[1:])) < 80

    env = Environment(torch.device('cpu'), 'float32', False, 0, 0, 1, '')
    with script_settings(bench, *SMALL, '--lora_rank=3'):
        run = bench.build_run(bench.build_model(env, 50), env)
    trained = {tuple(p.shape) for group in run.optimizer.param_groups for p in group['params']}
    assert trained and all(3 in shape for shape in trained)


def test_the_table_of_memory_is_what_a_plan_prints(capsys, monkeypatch):
    """A row of docs/scaling.md has the flags, the GB at the most, and the GPU that has room."""
    models = {}                                     # each shape is built once

    def build(config):
        if repr(config) not in models:
            models[repr(config)] = GPT(config)
        return models[repr(config)]
    monkeypatch.setattr(bench, 'GPT', build)

    text = (ROOT / 'docs' / 'scaling.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| `(--config=[^`]+)` +\| .* \| +([\d.]+) \| +(\d+) GB \|$', text, re.M)
    assert len(rows) >= 8
    for flags, gigabytes, room in rows:
        found, _, shown = plan(capsys, '--plan=H100', *flags.split())
        assert f'{found:.1f}' == gigabytes, flags
        assert f'a GPU of {room} GB has room' in shown, flags


def test_the_trace_is_one_that_a_browser_opens(workspace):
    # a Python of its own, whose PyTorch prints at its start
    result = workspace.run_python('bench.py', *SMALL, '--profile=True')
    assert result.codes == [0]
    assert 'USDT' not in result.stdout + result.stderr

    trace = json.loads((workspace.folder / 'bench-trace.json').read_text())
    names = {event.get('name', '') for event in trace['traceEvents']}
    assert any('scaled_dot_product' in name for name in names)
    assert any('adamw' in name for name in names)


@pytest.mark.parametrize('flags, words', [
    ('--steps=0', 'steps=0 should be at least 1'),
    ('--steps=none', "steps='none' should be a whole number"),
    ('--n_head=7', 'does not divide over n_head=7'),
    ('--dtype=float8', "dtype='float8' is unknown"),
    ('--bench=everything', "bench='everything' should be one of"),
    ('--batchsize=1', 'did you mean batch_size?'),
    ('--real_data=True --dataset=nowhere', "dataset 'nowhere' has no train.bin"),
    ('--plan=abacus', "plan='abacus' is no GPU whose peak is known here; try H100"),
    ('--gpus=8', 'gpus is for a plan; try --plan=H100'),
    ('--lora_rank=8 --bench=sample', 'lora_rank is for the training step'),
    ('--plan=H100 --lora_rank=8 --gpus=8 --strategy=fsdp --gradient_accumulation_steps=8',
     'try --strategy=ddp'),
    ('--plan=H100 --gpus=0', 'gpus=0 should be at least 1'),
    ('--plan=H100 --config=train_gpt', 'did you mean train_gpt2'),
    ('--plan=H100 --config=train_gpt2 --gpus=7', 'try --gradient_accumulation_steps=42'),
    ('--plan=H100 --config=train_gpt2_fast --gpus=8 --strategy=fsdp', 'try --strategy=ddp'),
    ('--plan=H100 --init_from=gpt2-xl --n_layer=2', 'leave out --n_layer'),
    ('--plan=H100 --init_from=a/b', 'add --init_from=scratch'),
    ('--peers=nowhere', "peers='nowhere' has neither train.py nor sample.py; name the folder"),
    ('--peers=. --steps=7', 'steps does not change what --peers times; leave it out'),
    ('--peers_cases=shakespeare', 'peers_cases needs --peers=FOLDER'),
    ('--compare=gpt4', "compare='gpt4' should be one of"),
    ('--compare_dtype=float32', 'compare_dtype needs --compare=transformers'),
    ('--compare=transformers --bench=sample --new_tokens=1000',
     'cannot go past block_size=1024; try --new_tokens=992'),
])
def test_a_mistake_is_refused(flags, words):
    with pytest.raises(UserError, match=words):
        with script_settings(bench, '--device=cpu', *flags.split()) as overrides:
            bench.main(overrides)


# Another checkout

def test_another_checkout_is_timed_by_its_commands(monkeypatch, capsys):
    """This checkout is its own peer here, and what takes minutes is left out."""
    monkeypatch.setattr(bench.peer_timing.SamplingCase, 'measure',
                        lambda self, checkout, setup: dict(peer=0.5, here=0.1)[checkout.name])
    monkeypatch.setattr(bench, 'write_model', lambda folder, shape, dataset: None)
    run_here(f'--peers={ROOT}', '--peers_cases=sample_6x384', '--device=cpu')
    lines = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in lines[-1].split('|')]
    assert cells[2:5] == ['2.0 tok/s', '10.0 tok/s', '5.00 (5.00 to 5.00)']


def test_a_peer_that_can_do_nothing_ends_the_command(tmp_path, capsys):
    (tmp_path / 'train.py').write_text('raise OSError("no data")')
    with pytest.raises(RunError, match='no case could be timed'):
        run_here(f'--peers={tmp_path}', '--peers_cases=shakespeare', '--device=cpu')
    assert 'failed: peer: train.py: OSError: no data' in capsys.readouterr().out


def test_an_unknown_case_is_refused():
    with pytest.raises(UserError, match="peers_cases='naps' has 'naps'; try shakespeare"):
        run_here(f'--peers={ROOT}', '--peers_cases=naps')
