"""The optimizer: parameter groups, one guarded step, and its state in checkpoints.

The names of moments and of the guard stay in this file.
"""

import math

import torch

from engine import parallel
from engine.errors import UserError


def adamw(model, learning_rate, weight_decay, betas):
    """AdamW with weight decay on matrices and embeddings, none on biases and norms.

    The order of groups and parameters is nanoGPT's, so that the optimizer states of its
    checkpoints fit. Fused on every device: on a CPU that is three times as fast as the loop.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in parameters if p.dim() >= 2], weight_decay=weight_decay),
              dict(params=[p for p in parameters if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def set_lr(optimizer, learning_rate):
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group['lr'] = learning_rate


def step(optimizer, scaler, loss, grad_clip):
    """Clip the gradients, update the weights, clear the gradients. Returns the gradient norm, a scalar tensor.

    loss: scalar tensor, the loss of this step. grad_clip: largest norm, 0 for no limit. If the loss
    or the norm is not finite, the weights stay as they are. The device decides that, so the host
    does not wait. (AdamW on a Mac ignores found_inf; the log then ends the run before a save.)
    """
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    if parallel.is_shard(norm):
        norm = norm.full_tensor()
    if scaler.is_enabled():
        scaler.step(optimizer)                          # skips the update itself, and lowers the scale
        scaler.update()
    else:
        optimizer.found_inf = (~torch.isfinite(loss + norm)).float()
        optimizer.step()                                # the fused AdamW skips the update where this is 1
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
    try:
        if scaler.is_enabled() and saved.get('scaler'):
            scaler.load_state_dict(saved['scaler'])
        orders = [[group['params'] for group in state['param_groups']] for state in (saved['optimizer'], fresh)]
        fits = orders[0] == orders[1]
        for index, moment in saved['optimizer']['state'].items():
            moments[index] = {'step': torch.tensor(float(moment['step']))}
            for name in ('exp_avg', 'exp_avg_sq'):
                moments[index][name] = parallel.shard_like(parameters[index], moment[name]).clone()
                fits = fits and moments[index][name].shape == parameters[index].shape
        fits = fits and len(moments) in (0, len(parameters))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(f'the optimizer state is not one of AdamW ({type(error).__name__}: {error})') from None
    if not fits:
        raise UserError('the optimizer state belongs to a model of another shape')
    optimizer.load_state_dict({'state': moments, 'param_groups': fresh['param_groups']})
