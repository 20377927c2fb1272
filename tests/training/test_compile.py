"""torch.compile on a CPU: one graph, no graph breaks, the same numbers as eager mode.

A GPU needs these properties too; tests/test_cuda.py measures them there.
"""

import shutil
import sys

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from harness import take_step
from torch._dynamo.backends.common import aot_autograd

from engine.distributed import Environment
from engine.training import optim, parallel
from model import GPT, GPTConfig

if not shutil.which('g++') and not shutil.which('clang++') or sys.platform == 'win32':
    pytest.skip('torch.compile needs a C++ compiler on a CPU', allow_module_level=True)


@pytest.fixture
def counters():
    """PyTorch's counts of graphs, graph breaks and recompilations from here on."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def tiny_gpt(**changes):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
    return GPT(GPTConfig(**{**shape, **changes}))


def environment(compile, world_size=1):
    return Environment(torch.device('cpu'), 'float32', compile, 0, 0, world_size, '')


def boxed(graph, inputs):
    """A compiled graph that runs as it is."""
    return make_boxed_func(graph)


def train_and_evaluate(compile):
    """Losses of 5 steps on 2 sequences, with an evaluation on 4 sequences between them."""
    model = tiny_gpt()
    wrapped = parallel.wrap(model, environment(compile))
    optimizer = optim.adamw(model, 1e-2, 0.1, (0.9, 0.95))
    tokens = torch.randint(50, (7, 4, 17), generator=torch.Generator().manual_seed(0))

    losses = []
    for step in range(5):
        if step in (0, 3):
            wrapped.eval()
            with torch.no_grad():
                losses.append(wrapped(tokens[5][:, :-1], tokens[5][:, 1:])[1].item())
            wrapped.train()

        loss = wrapped(tokens[step][:2, :-1], tokens[step][:2, 1:])[1]
        take_step(optimizer, loss)
        losses.append(loss.item())
    return losses


def test_training_compiles_to_one_graph_and_evaluation_to_another(counters):
    compiled = train_and_evaluate(True)
    assert counters['stats']['unique_graphs'] == 2
    assert not counters['graph_break']
    assert compiled == pytest.approx(train_and_evaluate(False), rel=1e-4)


def test_a_compiled_step_returns_the_loss_alone(monkeypatch, counters):
    """Autograd would fill a gradient of zeros for each logit that it returns."""
    torch_compile = torch.compile
    returned = []

    def backend(graph, inputs):
        returned.append([node.meta['example_value'].shape
                         for node in graph.graph.output_node().all_input_nodes])
        return graph
    monkeypatch.setattr(torch, 'compile', lambda model, **options: torch_compile(
        model, backend=backend, **options))

    idx = torch.randint(50, (2, 16))
    logits, expected = tiny_gpt()(idx, idx)
    assert logits.shape == (2, 16, 50)
    found = parallel.wrap(tiny_gpt(), environment(True))(idx, idx)
    assert found == (None, expected)
    assert returned == [[()]]


def test_gradients_go_to_other_machines_before_the_backward_pass_ends(
        tmp_path, monkeypatch, counters):
    """A block of 1.2 MB fills the first bucket of gradients, and is sent before the next block."""
    torch_compile = torch.compile
    events = []

    def compile_backward(graph, inputs):
        def backward(*arguments):
            gradients = graph(*arguments)
            events.append('backward of a block')
            return gradients
        return make_boxed_func(backward)

    backend = aot_autograd(fw_compiler=boxed, bw_compiler=compile_backward)
    monkeypatch.setattr(torch, 'compile', lambda function, **options: torch_compile(
        function, backend=backend, **options))

    def send(_, bucket):
        events.append('send')
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')         # of 4 ranks, so there are 2 machines
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    ddp = parallel.wrap(tiny_gpt(n_embd=160), environment(True, world_size=4))
    ddp.register_comm_hook(None, send)
    idx = torch.randint(50, (2, 16))
    ddp(idx, idx)[1].backward()
    dist.destroy_process_group()
    assert events[:3] == ['backward of a block', 'send', 'backward of a block']


def test_generation_compiles_once_and_never_per_token(counters):
    model = tiny_gpt().eval()
    idx = torch.randint(50, (2, 3))
    options = dict(temperature=0.9, top_k=10, noise=torch.rand(2, 40))
    expected = model.generate(idx, 40, **options)
    assert torch.equal(model.generate(idx, 40, compile=True, **options), expected)
    assert counters['stats']['unique_graphs'] == 1
    assert not counters['graph_break']

    caches = model.decoder.kv_caches
    for _ in range(3):
        assert torch.equal(model.generate(idx, 40, compile=True, **options), expected)
    assert counters['stats']['unique_graphs'] == 1
    assert model.decoder.kv_caches is caches


def test_a_compiled_step_that_is_interrupted_leaves_a_decoder_that_is_right(counters, monkeypatch):
    """The model keeps the decoder, as a notebook keeps the model."""
    model = tiny_gpt().eval()
    idx = torch.randint(50, (1, 3))
    options = dict(noise=torch.rand(1, 5), compile=True)
    expected = model.generate(idx, 5, **options)

    def interrupt(*arguments):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.decoder, 'step', interrupt)
        model.generate(idx, 5, **options)
    assert torch.equal(model.generate(idx, 5, **options), expected)


@pytest.mark.slow
def test_any_number_of_shapes_can_be_compiled(monkeypatch, counters):
    """PyTorch refuses a ninth variant of one function by default, with any backend."""
    torch_compile = torch.compile

    def compile_by_tracing(function, mode=None, **options):
        return torch_compile(function, backend='eager', **options)
    monkeypatch.setattr(torch, 'compile', compile_by_tracing)

    model = tiny_gpt().eval()
    for batch_size in range(1, 13):
        idx = torch.randint(50, (batch_size, 3))
        noise = torch.rand(batch_size, 5)
        compiled = model.generate(idx, 5, noise=noise, compile=True)
        assert torch.equal(compiled, model.generate(idx, 5, noise=noise))
    assert counters['stats']['unique_graphs'] == 12


@pytest.mark.slow
def test_two_compiled_ranks_train_as_one_process_in_one_graph_each(workspace):
    flags = ['--dropout=0', '--max_iters=4', '--eval_interval=100']
    workspace.train('out-eager', *flags)
    result = workspace.run_python('train.py', *workspace.flags('out-compiled'), *flags,
                                  '--compile=True', ranks=2, TORCH_LOGS='graph_code')
    assert result.codes == [0], result.stderr

    records = zip(workspace.records('out-eager'), workspace.records('out-compiled'), strict=True)
    for one, two in records:
        assert two == {key: pytest.approx(value, rel=1e-4) for key, value in one.items()}

    # training, evaluation, and the function that shows whether the compiler works, on each rank
    assert result.stderr.count('TRACED GRAPH') == 2 * 3
