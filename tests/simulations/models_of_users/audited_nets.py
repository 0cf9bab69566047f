"""Models of users for the audit: one that keeps examples apart, and models that do not."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        self.of_inputs = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.of_inputs(self, x)


def mlp(*, framework="torch"):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def dropout(*, framework="torch"):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10))


def centered(*, framework="torch"):
    def forward(net, x):
        h = net.hidden(x.flatten(1))
        return net.out(h - h.mean(0))

    return Net(forward, hidden=nn.Linear(64, 32), out=nn.Linear(32, 10))


def tokens_as_rows(*, framework="torch"):
    def forward(net, x):
        h = torch.tanh(net.hidden(x.reshape(-1, 8)))
        return net.out(h).reshape(len(x), 8, 10).mean(1)

    return Net(forward, hidden=nn.Linear(8, 32), out=nn.Linear(32, 10))


def time_first(*, framework="torch"):
    def forward(net, x):
        h = torch.tanh(net.hidden(x.reshape(len(x), 8, 8).transpose(0, 1)))
        return net.out(h).mean(0)

    return Net(forward, hidden=nn.Linear(8, 32), out=nn.Linear(32, 10))


def half_frozen(*, framework="torch"):
    """Return a model whose hidden layer gets no gradient."""

    def forward(net, x):
        return net.out(torch.relu(net.hidden(x.flatten(1))).detach())

    return Net(forward, hidden=nn.Linear(64, 32), out=nn.Linear(32, 10))
