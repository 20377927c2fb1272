"""Network health: magnitudes of each layer while it trains, and warnings of what precedes trouble.

Every `interval` iterations, for each layer (an embedding, a block, the last norm, an untied head):

    weight_norm             of all its parameters together, after the step
    grad_norm               of their gradients, as the optimizer gets them: averaged over ranks, unscaled, clipped
    update_ratio            norm of the step's change of the weights / weight_norm
    activation_rms          root mean square of its output; a block's output is the residual stream
    activation_max          largest magnitude in its output
    attention_entropy       nats, mean over heads and positions; near 0, each position attends to a single one
    attention_logit         largest score before the softmax
    dead_units              share of the MLP's units whose input to the nonlinearity (with swiglu: the gate's) is not
                            above 0 at any token that was read

Large attention logits: Wortsman et al. 2023 (arXiv:2309.14322). Entropy near 0: Zhai et al. 2023 (arXiv:2303.06296).
"""

import math
from collections import deque
from statistics import median

import torch

from engine.attention import CausalAttention
from engine.device import read_async
from engine.metrics.metrics_file import CLIPPED, PREFIX, TITLES

MAX_TOKENS = 4096           # that the extra forward pass reads, in whole sequences
MAX_ATTENDED = 2            # of those sequences, whose attention is measured
MAX_QUERIES = 1024          # positions of each whose scores are held at once, evenly spaced where there are more
CLIPPED_WINDOW = 100        # steps
# what precedes trouble: (largest value without a warning, what to do)
LIMITS = dict(
    update_ratio=(0.1, 'a lower --learning_rate or a longer warm-up may help'),
    attention_logit=(50, 'a lower --learning_rate may help, or --qk_norm=True in a new run'),
    clipped=(0.5, 'a lower --learning_rate or a longer warm-up may help'))


class HealthMonitor:
    """Measures the layers of run.model on one rank, without moving training: the losses stay the same to the bit.

    Weights, gradients and updates are measured around the optimizer's step, by hooks. Activations and attention come
    from one more forward pass of the plain model, in evaluation mode, over the first sequences of the iteration's
    batch. For the moment of the step this takes memory for a copy of the weights.

    run: engine.training.run.Run. data: dataloader.TokenDataset. env: distributed.Environment. print_line: prints one line.
    """

    def __init__(self, run, data, env, interval, print_line):
        self.run, self.data, self.env, self.interval, self.print_line = run, data, env, interval, print_line
        self.layers = find_layers(run.model)
        self.parameters = own_parameters(self.layers)
        # A layer that starts from zeros (zero_init) takes large relative steps at first.
        self.judged = {name for name, parameters in self.parameters.items() if any(p.any() for p in parameters)}
        self.clipped, self.warned = deque(maxlen=CLIPPED_WINDOW), set()
        self.before = None              # {layer: (gradient norm, copies of its weights)} of a step that is under way
        self.pending = {}               # iteration: (names, function that waits for their values)
        run.optimizer.register_step_pre_hook(self.before_step)
        run.optimizer.register_step_post_hook(self.after_step)

    # Muon's step calls that of AdamW, which may call the hooks too. The outer `before` is the first, and the inner `after`
    # comes when all weights have changed; the other two find nothing to do.

    @torch.no_grad()
    def before_step(self, *_):
        if self.run.progress.iter_num % self.interval == 0 and self.before is None:
            self.before = {name: (norm(p.grad for p in parameters), [p.clone() for p in parameters])
                           for name, parameters in self.parameters.items()}

    @torch.no_grad()
    def after_step(self, *_):
        if self.before is None:
            return
        found = {}                                              # (layer, quantity): scalar tensor
        for name, (grad_norm, copies) in self.before.items():
            weight_norm = found[name, 'weight_norm'] = norm(self.parameters[name])
            found[name, 'grad_norm'] = grad_norm
            found[name, 'update_ratio'] = norm(old.sub_(p) for p, old in zip(self.parameters[name], copies)) / weight_norm
        self.before = None
        found.update(self.read_batch())
        self.pending[self.run.progress.iter_num] = list(found), read_async(torch.stack(list(found.values())).float())

    def read_batch(self):
        """{(layer, quantity): scalar tensor} of one forward pass."""
        model, found, handles = self.run.model, {}, []
        T = self.data.block_size
        count = max(1, min(self.run.batch_schedule.split(self.run.progress.tokens)[1], MAX_TOKENS // T))
        tokens = self.data.batch(self.run.seed, 'train', self.run.progress.sequences, count)[0]     # (B, T)
        probes = [AttentionProbe() for _ in model.transformer.h]
        names = {layer: name for name, layer in self.layers.items()}

        def measure_output(layer, _, x):
            found[names[layer], 'activation_rms'] = x.float().square().mean().sqrt()
            found[names[layer], 'activation_max'] = x.float().abs().max()

        def measure_units(block):
            def measure(_, inputs, x):                          # (B, T, width, and as much again with a gate)
                dead = (x[..., :model.config.mlp_width].flatten(0, -2) <= 0).all(dim=0)
                found[names[block], 'dead_units'] = dead.float().mean()
            return measure

        was_training, _ = model.training, model.eval()
        try:
            handles += [layer.register_forward_hook(measure_output) for layer in self.layers.values()]
            handles += [block.mlp.c_fc.register_forward_hook(measure_units(block)) for block in model.transformer.h]
            with self.env.autocast():
                model.hidden(tokens.to(self.env.device), probes, torch.arange(T, device=self.env.device))
        finally:
            for handle in handles:
                handle.remove()
            model.train(was_training)
        for block, probe in zip(model.transformer.h, probes):
            found[names[block], 'attention_entropy'], found[names[block], 'attention_logit'] = probe.entropy, probe.logit
        return found

    def report(self, iteration, grad_norm):
        """Log, print and warn of what was measured in an iteration, if anything was. grad_norm: before clipping.
        Every finished step is reported, in order."""
        clip = self.run.grad_clip
        self.clipped.append(bool(clip) and math.isfinite(grad_norm) and grad_norm > clip)
        if iteration not in self.pending:
            return
        names, read = self.pending.pop(iteration)
        found, clipped = dict(zip(names, read())), sum(self.clipped) / len(self.clipped)
        if self.run.writer:
            numbers = {f'{PREFIX}/{layer}/{quantity}': value for (layer, quantity), value in found.items()}
            self.run.writer.write(iteration, **numbers, **{CLIPPED: clipped})
        for line in format_table(iteration, found, clipped, len(self.clipped)):
            self.print_line(line)
        for line in self.new_warnings(iteration, found, clipped):
            self.print_line(line)

    def new_warnings(self, iteration, found, clipped):
        """A line for each quantity that is over its limit for the first time since the process began."""
        worst = dict(clipped=(clipped if len(self.clipped) == CLIPPED_WINDOW else 0, ''))
        for (layer, quantity), value in found.items():
            if quantity in LIMITS and math.isfinite(value) and (layer in self.judged or quantity != 'update_ratio'):
                worst[quantity] = max(worst.get(quantity, (0, '')), (value, layer))
        for quantity, (value, layer) in worst.items():
            limit, advice = LIMITS[quantity]
            if value > limit and quantity not in self.warned:
                self.warned.add(quantity)
                what = (f'{TITLES[quantity]} of {layer} is {value:.3g}, over {limit:g}' if layer else
                        f'{value:.0%} of the last {CLIPPED_WINDOW} steps were clipped')
                yield f'warning: iteration {iteration}: {what}; {advice}'


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


def find_layers(module, prefix=''):
    """{name: child} of a model's children that have parameters, with those of lists and dicts in their place:
    {'wte': ..., 'h.0': ..., 'ln_f': ..., 'lm_head': ...}."""
    found = {}
    for name, child in module.named_children():
        if isinstance(child, torch.nn.ModuleDict):
            found.update(find_layers(child, prefix))            # GPT's own is called transformer; the name says nothing
        elif isinstance(child, torch.nn.ModuleList):
            found.update(find_layers(child, f'{prefix}{name}.'))
        elif any(True for _ in child.parameters()):
            found[prefix + name] = child
    return found


def own_parameters(layers):
    """{name: parameters that train} of `layers`, a tied one only in its first layer; layers without any are left out."""
    seen, found = set(), {}
    for name, layer in layers.items():
        own = [p for p in layer.parameters() if p.requires_grad and p not in seen]
        seen.update(own)
        if own:
            found[name] = own
    return found


def norm(tensors):
    """The norm of all numbers in some tensors together, a scalar tensor."""
    return torch.nn.utils.get_total_norm(list(tensors))


def format_table(iteration, found, clipped, steps):
    """The lines of a table with a row for each quantity: the layers with its lowest and highest value, the median."""
    head = f'health at iteration {iteration}'
    yield f'{head:<27}lowest            median   highest           ({clipped:.0%} of the last {steps} steps were clipped)'
    for quantity, title in TITLES.items():
        values = sorted((value, layer) for (layer, name), value in found.items()
                        if name == quantity and math.isfinite(value))
        if values:
            (low, lowest), (high, highest) = values[0], values[-1]
            yield f'  {title:<24} {low:<8.3g} {lowest:<8} {median(v for v, _ in values):<8.3g} {high:<8.3g} {highest}'
