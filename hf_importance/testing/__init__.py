"""Laws that every sampler keeps, as tests for pytest: a new method is held to them in three lines.

::

    from hf_importance.testing import SamplerLaws

    class TestMine(SamplerLaws):
        def sampler(self):
            return Mine()

They train a tiny BERT, made here, on the CPU: some seconds, and some more for the last, which starts two processes.
"""

import contextlib

with contextlib.suppress(ImportError):  # a process of two ranks needs none
    import pytest

    # So that a law that is broken says what was unequal.
    pytest.register_assert_rewrite("hf_importance.testing.laws", "hf_importance.testing.watched")

from hf_importance.testing.laws import SamplerLaws as SamplerLaws
from hf_importance.testing.watched import leave_processes as leave_processes
