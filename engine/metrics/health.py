"""Network health: magnitudes of each layer while it trains, and warnings of what precedes trouble.

Every `interval` iterations, for each layer (an embedding, a block, the last norm, an untied head):

    weight_norm             norm of all its parameters together, after the step
    grad_norm               norm of their gradients as the optimizer gets them: averaged over ranks,
                            unscaled, clipped
    update_ratio            norm of the step's change of the weights / weight_norm
    activation_rms          root mean square of its output; a block's output is the residual stream
    activation_max          largest magnitude in its output
    attention_entropy       nats, mean over heads and positions; near 0, each position attends to a
                            single one
    attention_logit         largest score before the softmax
    dead_units              share of the MLP's units whose input to the nonlinearity (with swiglu:
                            the gate's) is not above 0 at any token that was read

Large attention logits: Wortsman et al. 2023 (arXiv:2309.14322). Entropy near 0: Zhai et al. 2023
(arXiv:2303.06296).
"""

import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch

from engine.attention import CausalAttention
from engine.device import evaluation_mode, read_async
from engine.distributed import Environment
from engine.log import log
from engine.metrics.metrics_file import CLIPPED, CLIPPED_WINDOW, LIMITS, PREFIX, TITLES

MAX_TOKENS = 4096           # tokens that the extra forward pass reads, in whole sequences
MAX_ATTENDED = 2            # sequences of those whose attention is measured
MAX_QUERIES = 1024          # positions of each, evenly spaced, whose scores are held at once


class BeforeStep(NamedTuple):
    """What is kept of a layer until the optimizer's step is over."""
    grad_norm: torch.Tensor
    weights: list[torch.Tensor]         # copies


class UnreadMeasurement(NamedTuple):
    """The numbers of one iteration, which the device may still compute."""
    names: list[tuple[str, str]]        # layer and quantity of each number
    read: Callable[[], list[float]]     # waits for the numbers


class HealthMonitor:
    """Measures the layers of run.model on one rank.

    It does not move training: the losses stay the same to the bit. Weights, gradients and updates
    are measured around the optimizer's step, by hooks. Activations and attention come from one more
    forward pass of the plain model, in evaluation mode, over the first sequences of the iteration's
    batch. During the step this takes memory for a copy of the weights.

    run: the engine.training.run.Run that is measured.
    data: the TokenDataset that its batches come from.
    env: the device and its precision.
    interval: the iterations between measurements.
    """

    def __init__(self, run, data, env: Environment, interval: int):
        self.run = run
        self.data = data
        self.env = env
        self.interval = interval

        self.layers = find_layers(run.model)
        self.parameters = own_parameters(self.layers)
        self.start_nonzero = {name for name, parameters in self.parameters.items()
                              if any(parameter.any() for parameter in parameters)}

        self.warned = set()             # the quantities that were warned of
        self.before = None              # {layer: BeforeStep} during a step that is measured
        self.unread = {}                # {iteration: UnreadMeasurement}

        run.optimizer.register_step_pre_hook(self.before_step)
        run.optimizer.register_step_post_hook(self.after_step)

    # Muon's step ends with AdamW's, and PyTorch may call these hooks around both:
    #
    #     before_step, of Muon        takes the copies
    #     before_step, of AdamW       finds them taken, and does nothing
    #     after_step, of AdamW        measures; by now all weights have changed
    #     after_step, of Muon         finds no copies, and does nothing

    @torch.no_grad()
    def before_step(self, *_):
        """Keep the norms of the gradients and copies of the weights, if this step is measured."""
        if self.run.progress.iter_num % self.interval or self.before is not None:
            return

        self.before = {}
        for layer, parameters in self.parameters.items():
            grad_norm = norm(parameter.grad for parameter in parameters)
            weights = [parameter.clone() for parameter in parameters]
            self.before[layer] = BeforeStep(grad_norm, weights)

    @torch.no_grad()
    def after_step(self, *_):
        """Measure everything, and begin to copy the numbers to the host."""
        if self.before is None:
            return

        found = self.measure_weights()
        self.before = None                              # frees the copies before the forward pass
        found.update(self.measure_forward_pass())

        numbers = torch.stack(list(found.values())).float()
        measurement = UnreadMeasurement(list(found), read_async(numbers))
        self.unread[self.run.progress.iter_num] = measurement

    def measure_weights(self):
        """{(layer, quantity): scalar tensor} of the weights, their gradients and their change."""
        found = {}
        for layer, (grad_norm, copies) in self.before.items():
            parameters = self.parameters[layer]
            weight_norm = norm(parameters)
            # In place, as there is no memory to spare for another copy of the weights
            update_norm = norm(old.sub_(new) for old, new in zip(copies, parameters))

            found[layer, 'weight_norm'] = weight_norm
            found[layer, 'grad_norm'] = grad_norm
            found[layer, 'update_ratio'] = update_norm / weight_norm
        return found

    def measure_forward_pass(self):
        """{(layer, quantity): scalar tensor} of the activations and the attention."""
        model = self.run.model
        tokens = self.first_sequences().to(self.env.device)         # (B, T)
        positions = torch.arange(tokens.size(1), device=self.env.device)
        probes = [AttentionProbe() for _ in model.transformer.h]

        found = {}
        with self.measuring_hooks(found), evaluation_mode(model), self.env.autocast():
            model.hidden(tokens, probes, positions)

        for i, probe in enumerate(probes):
            found[f'h.{i}', 'attention_entropy'] = probe.entropy
            found[f'h.{i}', 'attention_logit'] = probe.logit
        return found

    def first_sequences(self):
        """The tokens of the first sequences of this iteration's batch, (B, T)."""
        progress = self.run.progress

        # As many as fit MAX_TOKENS, but at least one
        _, micro_batch_size = self.run.batch_schedule.rank_share(progress.tokens)
        count = min(micro_batch_size, MAX_TOKENS // self.data.block_size)
        count = max(1, count)

        tokens, _ = self.data.batch(self.run.seed, 'train', progress.sequences, count)
        return tokens

    @contextmanager
    def measuring_hooks(self, found):
        """While the block runs, forward passes of the model fill `found`."""
        handles = []

        # The output of each layer
        for name, layer in self.layers.items():
            hook = measure_output(name, found)
            handles.append(layer.register_forward_hook(hook))

        # What goes into the nonlinearity of each block
        for i, block in enumerate(self.run.model.transformer.h):
            hook = measure_units(f'h.{i}', self.run.model.config.mlp_width, found)
            handles.append(block.mlp.c_fc.register_forward_hook(hook))

        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def report(self, iteration: int, grad_norm: float) -> None:
        """Log and print what was measured in an iteration, if anything was, with warnings.

        Every finished step is reported, in order. grad_norm: the norm before clipping.
        """
        limit = self.run.grad_clip
        clipped_steps = self.run.clipped
        clipped_steps.append(limit > 0 and math.isfinite(grad_norm) and grad_norm > limit)
        del clipped_steps[:-CLIPPED_WINDOW]
        if iteration not in self.unread:
            return

        names, read = self.unread.pop(iteration)
        found = dict(zip(names, read()))
        clipped = sum(clipped_steps) / len(clipped_steps)

        if self.run.writer:
            numbers = {f'{PREFIX}/{layer}/{quantity}': value
                       for (layer, quantity), value in found.items()}
            self.run.writer.write(iteration, **numbers, **{CLIPPED: clipped})

        for line in format_table(iteration, found, clipped, len(clipped_steps)):
            log.info(line)
        for line in self.new_warnings(iteration, found, clipped):
            log.warning(line)

    def new_warnings(self, iteration, found, clipped):
        """A line for each quantity that is over its limit for the first time in this process."""
        causes = {}             # {quantity: what is wrong}

        window_is_full = len(self.run.clipped) == CLIPPED_WINDOW
        if window_is_full and clipped > LIMITS['clipped'].value:
            causes['clipped'] = f'{clipped:.0%} of the last {CLIPPED_WINDOW} steps were clipped'

        for quantity in ('update_ratio', 'attention_logit'):
            worst = self.find_worst(quantity, found)
            if worst and worst.value > LIMITS[quantity].value:
                causes[quantity] = (f'{TITLES[quantity]} of {worst.layer} is {worst.value:.3g}, '
                                    f'over {LIMITS[quantity].value:g}')

        for quantity, cause in causes.items():
            if quantity not in self.warned:
                self.warned.add(quantity)
                advice = LIMITS[quantity].advice
                yield f'warning: iteration {iteration}: {cause}; {advice}'

    def find_worst(self, quantity, found):
        """The largest Value of a quantity, or None where no layer has one."""
        values = finite_values(quantity, found)
        if quantity == 'update_ratio':
            # A layer that starts from zeros (zero_init) takes large relative steps at first.
            values = [value for value in values if value.layer in self.start_nonzero]
        return max(values, default=None)


class AttentionProbe(CausalAttention):
    """Causal attention whose scores are measured, on MAX_ATTENDED sequences.

    entropy: nats, mean over heads and positions. logit: the largest score. Both are scalar tensors.
    """

    def attend(self, q, k, v, bias=None):
        with torch.autocast(q.device.type, enabled=False):
            scores = self.scores(q[:MAX_ATTENDED], k[:MAX_ATTENDED], bias)
            self.logit = scores.max()
            p = scores.softmax(dim=-1)
            self.entropy = -torch.xlogy(p, p).sum(dim=-1).mean()
        return super().attend(q, k, v, bias)

    def scores(self, q, k, bias):
        """The scores before the softmax, -inf for later keys, of R queries of q: (B, H, R, T)."""
        T = q.size(2)
        positions = torch.arange(T, device=q.device)
        rows = positions[::math.ceil(T / MAX_QUERIES)]                      # (R,)
        keys = k.repeat_interleave(q.size(1) // k.size(1), dim=1).float()
        scores = q[:, :, rows].float() @ keys.mT / math.sqrt(q.size(-1))
        if bias is None:
            return scores.masked_fill_(positions > rows[:, None], -math.inf)
        return scores.add_(bias[..., rows, :])


# What hooks measure

def measure_output(layer_name, found):
    """A forward hook that measures a layer's output."""
    def hook(layer, inputs, output):
        magnitudes = output.float()                     # squares overflow float16
        found[layer_name, 'activation_rms'] = magnitudes.square().mean().sqrt()
        found[layer_name, 'activation_max'] = magnitudes.abs().max()
    return hook


def measure_units(block_name, width, found):
    """A forward hook that measures the input of the nonlinearity of an MLP.

    width: how many units the MLP has. With a gate, as many values follow them.
    """
    def hook(layer, inputs, output):                    # (B, T, width or 2 width)
        units = output[..., :width].flatten(0, -2)      # (B T, width)
        dead = (units <= 0).all(dim=0)
        found[block_name, 'dead_units'] = dead.float().mean()
    return hook


# Layers and their parameters

def find_layers(module, prefix=''):
    """The children of a model that have parameters, and in place of lists and dicts their children.

    {'wte': ..., 'h.0': ..., 'ln_f': ..., 'lm_head': ...}
    """
    found = {}
    for name, child in module.named_children():
        if isinstance(child, torch.nn.ModuleDict):      # GPT's `transformer`; the name says nothing
            found.update(find_layers(child, prefix))
        elif isinstance(child, torch.nn.ModuleList):
            found.update(find_layers(child, f'{prefix}{name}.'))
        elif any(True for _ in child.parameters()):
            found[prefix + name] = child
    return found


def own_parameters(layers):
    """{name: the parameters that train} of `layers`. A tied one belongs to its first layer.

    Layers without any are left out.
    """
    seen = set()
    found = {}
    for name, layer in layers.items():
        # Tensors are hashed by identity, so a tied one is found in `seen`.
        own = [p for p in layer.parameters() if p.requires_grad and p not in seen]
        seen.update(own)

        if own:
            found[name] = own
    return found


def norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The norm of all numbers in some tensors together, a scalar tensor."""
    return torch.nn.utils.get_total_norm(list(tensors))


# What people read

class Value(NamedTuple):
    """What a layer has of a quantity."""
    value: float
    layer: str


def finite_values(quantity, found):
    """The Value of each layer that has a finite one."""
    return [Value(value, layer) for (layer, name), value in found.items()
            if name == quantity and math.isfinite(value)]


def format_table(iteration, found, clipped, steps):
    """The lines of a table with a row for each quantity.

    A row has the lowest value and its layer, the median, the highest value and its layer.
    clipped: the share of the last `steps` steps that were clipped.
    """
    title = f'health at iteration {iteration}'
    yield (f'{title:<27}lowest            median   highest           '
           f'({clipped:.0%} of the last {steps} steps were clipped)')

    for quantity, title in TITLES.items():
        values = sorted(finite_values(quantity, found))
        if not values:
            continue
        lowest = values[0]
        highest = values[-1]
        middle = median(value for value, _ in values)
        yield (f'  {title:<24} {lowest.value:<8.3g} {lowest.layer:<8} {middle:<8.3g} '
               f'{highest.value:<8.3g} {highest.layer}')
