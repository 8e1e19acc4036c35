"""A gradient that cannot be differentiated again, and says so."""

import torch


class FirstOrderOnly(torch.autograd.Function):
    """Identity on a gradient of the operator `name`, whose own derivative is not available."""

    @staticmethod
    def forward(ctx, name, grad, *sources):
        ctx.name = name
        return grad.detach().clone()

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{ctx.name} has a second-order gradient in its dense form only. "
            'Use backend="reference" where one is needed.'
        )
