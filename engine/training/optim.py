"""The optimizer, AdamW or Muon: parameter groups, one guarded step, and its state in checkpoints.

The names of moments and of the guard stay in this file.
"""

import math

import torch

from engine import distributed
from engine.errors import UserError
from engine.training import parallel

FIRST_MOMENTUM, MOMENTUM_WARMUP = 0.85, 300             # of Muon; the second in iterations
NEWTON_SCHULZ, PRECISION = (3.4445, -4.775, 2.0315), torch.bfloat16     # factors of x, x^3 and x^5


def build(name, model, learning_rate, weight_decay, betas, muon_lr, muon_momentum=0.95):
    """The optimizer 'adamw' or 'muon'. muon_lr: the highest rate of the matrices that Muon updates. muon_momentum: its momentum,
    after its warm-up."""
    if name not in ('adamw', 'muon'):
        raise UserError(f"optimizer={name!r} is unknown; try 'adamw' or 'muon'")
    if name == 'adamw':
        return adamw(model, learning_rate, weight_decay, betas)
    return Muon(model, learning_rate, weight_decay, betas, muon_lr, muon_momentum)


def adamw(model, learning_rate, weight_decay, betas):
    """AdamW with weight decay on matrices and embeddings, none on biases and norms.

    The order of groups and parameters is nanoGPT's, so that the optimizer states of its
    checkpoints fit. Fused on every device: on a CPU that is three times as fast as the loop.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in parameters if p.dim() >= 2], weight_decay=weight_decay),
              dict(params=[p for p in parameters if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


class Muon(torch.optim.AdamW):
    """Muon for the matrices of the blocks, AdamW for embeddings, an untied head, biases and norms.

    A matrix moves by its momentum with all singular values brought near 1. The formula is that of torch.optim.Muon
    with adjust_lr_fn='original': Nesterov momentum, five Newton-Schulz steps in bfloat16, the rate times
    sqrt(rows / columns) where that is above 1, decoupled weight decay. Two things differ. Where one weight holds
    several matrices (queries, keys and values; the gate and the value of SwiGLU), each is updated by itself. And
    matrices of one shape go through Newton-Schulz together, which is faster. Under DDP every rank does the same.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
    """

    def __init__(self, model, learning_rate, weight_decay, betas, muon_lr, muon_momentum):
        c, blocks = model.config, model.transformer.h
        rows = {id(block.attn.c_attn.weight): [heads * c.head_size for heads in (c.n_head, c.kv_heads, c.kv_heads)]
                for block in blocks}
        if c.activation == 'swiglu':
            rows.update({id(block.mlp.c_fc.weight): [c.mlp_width] * 2 for block in blocks})
        matrices = [p for p in blocks.parameters() if p.dim() == 2 and p.requires_grad]
        others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices) and p.requires_grad]
        groups = [dict(params=matrices, weight_decay=weight_decay, lr=muon_lr, lr_scale=muon_lr / learning_rate,
                       momentum=muon_momentum, last_momentum=muon_momentum,
                       rows=[rows.get(id(p), [len(p)]) for p in matrices]),
                  dict(params=[p for p in others if p.dim() >= 2], weight_decay=weight_decay),
                  dict(params=[p for p in others if p.dim() < 2], weight_decay=0.0)]
        super().__init__(groups, lr=learning_rate, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        self.update_matrices(groups[0])
        self.param_groups = groups[1:]                          # AdamW updates these
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def update_matrices(self, group):
        found_inf = getattr(self, 'found_inf', None)            # 1 on the device where nothing may change
        enabled = torch.ones((), device=group['params'][0].device) if found_inf is None else (found_inf == 0).float()
        keep = 1 - group['lr'] * group['weight_decay'] * enabled
        wide = {}                                               # shape: [(matrix, its momentum)], turned if it is tall
        for p, rows in zip(group['params'], group['rows']):
            gradient = p.grad.nan_to_num_(0.0, 0.0, 0.0)        # the product with 0 is then 0
            if p not in self.state:                             # AdamW's load_state_dict wants a step everywhere
                self.state[p].update(step=torch.zeros((), device=p.device), momentum_buffer=torch.zeros_like(p))
            self.state[p]['step'] += enabled
            buffer = self.state[p]['momentum_buffer'].lerp_(gradient, (1 - group['momentum']) * enabled)
            p.mul_(keep)
            for matrix, update in zip(p.split(rows), gradient.lerp(buffer, group['momentum']).split(rows)):
                update = update if matrix.size(0) <= matrix.size(1) else update.t()
                wide.setdefault(update.shape, []).append((matrix, update))
        for pairs in wide.values():
            for (matrix, _), update in zip(pairs, orthogonalize(torch.stack([update for _, update in pairs]))):
                rate = group['lr'] * math.sqrt(max(1, matrix.size(0) / matrix.size(1))) * enabled
                matrix.sub_((update if update.shape == matrix.shape else update.t()) * rate)


def orthogonalize(x):
    """Each of the matrices x (N, rows, columns), rows <= columns, with all singular values moved to within
    about 0.3 of 1, by five steps of a Newton-Schulz iteration in PRECISION."""
    a, b, c = NEWTON_SCHULZ
    x = x.to(PRECISION)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT                                         # (N, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def set_lr(optimizer, learning_rate, iteration=MOMENTUM_WARMUP):
    """Set the learning rate of every parameter group. Muon's matrices keep their ratio to it, and their momentum
    changes linearly from 0.85 at iteration 0 to muon_momentum at iteration 300."""
    for group in optimizer.param_groups:
        group['lr'] = learning_rate * group.get('lr_scale', 1)
        if 'momentum' in group:
            warm = min(1, iteration / MOMENTUM_WARMUP)
            group['momentum'] = FIRST_MOMENTUM + (group['last_momentum'] - FIRST_MOMENTUM) * warm


def step(optimizer, scaler, loss, grad_clip):
    """Clip the gradients, update the weights, clear the gradients. Returns the gradient norm, a scalar tensor.

    loss: scalar tensor, the loss of this step. grad_clip: largest norm, 0 for no limit. If the loss
    or the norm is not finite, the weights stay as they are. The device decides that, so the host
    does not wait. (AdamW on a Mac ignores found_inf; the log then ends the run before a save.)
    """
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    if distributed.is_shard(norm):
        norm = norm.full_tensor()
    if scaler.is_enabled():
        scaler.step(optimizer)                          # skips the update itself, and lowers the scale
        scaler.update()
    else:
        optimizer.found_inf = (~torch.isfinite(loss + norm)).float()
        optimizer.step()                                # Muon and the fused AdamW skip the update where this is 1
    optimizer.zero_grad(set_to_none=True)
    return norm


def state_dict(optimizer, scaler):
    """{'optimizer', 'scaler'}: what `load_state_dict` restores."""
    return dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())


def load_state_dict(optimizer, scaler, saved):
    """Restore the moments and the loss scale from a loaded state, as far as it has them.

    The learning rate, betas and weight decay of `optimizer` stay. Raises UserError where the
    moments do not fit its parameters.
    """
    if 'optimizer' not in saved:
        return
    fresh, moments = optimizer.state_dict(), {}
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    n_matrices = len(optimizer.param_groups[0]['params']) if isinstance(optimizer, Muon) else 0
    kind, other = ('muon', 'adamw') if n_matrices else ('adamw', 'muon')
    try:
        state, groups = saved['optimizer']['state'], saved['optimizer']['param_groups']
        if any('momentum' in group for group in groups) != bool(n_matrices):
            raise UserError(f'the run was trained with optimizer={other}, whose state optimizer={kind} cannot take; '
                            f'go on with --optimizer={other}')
        if scaler.is_enabled() and saved.get('scaler'):
            scaler.load_state_dict(saved['scaler'])
        fits = [group['params'] for group in groups] == [group['params'] for group in fresh['param_groups']]
        for index, moment in state.items():
            moments[index] = {'step': torch.tensor(float(moment['step']))}
            for name in ('momentum_buffer',) if index < n_matrices else ('exp_avg', 'exp_avg_sq'):
                moments[index][name] = parallel.shard_like(parameters[index], moment[name]).clone()
                fits = fits and moments[index][name].shape == parameters[index].shape
        fits = fits and len(moments) in (0, len(parameters))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'the optimizer state is not one of {kind} ({type(error).__name__}: {error})') from None
    if not fits:
        raise UserError('the optimizer state belongs to a model of another shape')
    optimizer.load_state_dict({'state': moments, 'param_groups': fresh['param_groups']})
