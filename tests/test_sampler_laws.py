"""Every sampler of the package, and a user's, is held to the laws of ``hf_importance.testing``."""

import inspect
from pathlib import Path

import pytest
import torch
from user_sampler import TopK

from hf_importance import Auto, History, Observe, Presample
from hf_importance.samplers.published import (
    InfoBatch,
    OnlineBatchSelection,
    Prioritized,
    RhoLoss,
    SelectiveBackprop,
)
from hf_importance.samplers.two_phase import TwoPhase
from hf_importance.testing import SamplerLaws


class Laws(SamplerLaws):
    @pytest.mark.slow  # 15 s each on two shared CPU cores
    def test_two_ranks_decide_alike(self, tmp_path):
        super().test_two_ranks_decide_alike(tmp_path)


class TestPresample(Laws):
    unbiased = True

    def sampler(self):
        return Presample(ratio=3.0, threshold=1.0 + 1e-9, momentum=0.0)


class TestPresampleWithReplacement(Laws):
    unbiased = True

    def sampler(self):
        return Presample(ratio=3.0, threshold=1.0 + 1e-9, momentum=0.0, resampling="multinomial")


class TestPresampleByPrice(Laws):
    unbiased = True
    steps = 60

    def sampler(self):
        return Presample(kappa=0.1)


class TestHistory(Laws):
    unbiased = True
    steps = 60
    examples = 192

    def sampler(self):
        return History(budget="constant_variance", margin=1.0)


class TestAuto(Laws):
    steps = 60
    unbiased = True

    def sampler(self):
        return Auto(Presample(kappa=0.1))


class TestTwoPhase(Laws):
    unbiased = True
    steps = 60
    examples = 192

    def sampler(self):
        return TwoPhase(Presample(kappa=0.1))


class TestObserve(Laws):
    draws = False
    steps = 60

    def sampler(self):
        return Observe(Presample(kappa=0.1))


class TestOnlineBatchSelection(Laws):
    def sampler(self):
        return OnlineBatchSelection(redraw_every=3, recompute_every=10)


class TestPrioritized(Laws):
    def sampler(self):
        return Prioritized()


class TestSelectiveBackprop(Laws):
    def sampler(self):
        return SelectiveBackprop()


class TestInfoBatch(Laws):
    unbiased = True

    def sampler(self):
        return InfoBatch()


class TestRhoLoss(Laws):
    def sampler(self):
        return RhoLoss(torch.rand(self.examples, generator=torch.Generator().manual_seed(0)), ratio=3)


class TestUsers(Laws):
    def sampler(self):
        return TopK()


def test_the_page_shows_the_users_sampler():
    page = (Path(__file__).parents[1] / "docs" / "write_a_sampler.md").read_text()
    assert inspect.getsource(TopK) in page
