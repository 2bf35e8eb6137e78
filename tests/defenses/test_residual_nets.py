"""Every defense takes steps on a BatchNorm net with skips, and on a transformer without BatchNorm, with 32x32 color
images, as it will have to on a GPU."""

from __future__ import annotations

import pytest
import torch

from bench import plugins
from bench.core.defense import Batch, Losses
from bench.models.common import Inputs
from bench.planning import catalog
from bench.planning.job_fields import JobThreat, PluginChoice

STEPS = 2
WITHOUT_BOUNDS = {("crown_ibp", "vit_tiny"), ("ibp", "vit_tiny")}
NETS = {"preact_resnet18": {"width": 8}, "vit_tiny": {"depth": 2, "dim": 24, "patch": 8}}


class Plain:
    """SGD without a schedule; clipped, as the closed-form loss of a fresh transformer has gradients above 1000."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.net = net
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def descend(self, terms: Losses) -> None:
        self.optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("name", catalog.names("defenses"))
@pytest.mark.parametrize("model", NETS)
def test_a_narrow_net_trains(name: str, model: str) -> None:
    torch.manual_seed(0)
    plugin = catalog.get("defenses", name)
    norm = plugin.norms[0]
    threat = JobThreat(norm, "8/255") if plugin.uses_threat else None
    defense = plugins.make("defenses", PluginChoice(name, plugins.load("defenses", name).test_settings), threat)
    net = defense.wrap(plugins.build_model(model, NETS[model], Inputs(3, 32, 10, (0.5,) * 3, (0.25,) * 3)))
    if (name, model) in WITHOUT_BOUNDS:
        with pytest.raises(ValueError, match="no interval bounds"):
            defense.check(net.eval(), torch.zeros(1, 3, 32, 32), 10)
        return
    net = net.to(memory_format=torch.channels_last).train()
    learned = [p for p in net.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in learned]
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8) % 10
    updater = Plain(net)
    for step in range(STEPS):
        terms = defense.step(net, updater, Batch(x, y, torch.arange(8), 0, step / STEPS))
        assert all(torch.isfinite(term) for term in terms.values()), terms
    moved = [
        not torch.equal(a, b) for a, b in zip(before, (p for p in net.parameters() if p.requires_grad), strict=True)
    ]
    assert sum(moved) >= 0.95 * len(moved)
    model = defense.deploy(net.eval())
    with torch.no_grad():
        assert model(x).shape == (8, 10)
