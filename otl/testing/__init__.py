"""The contract that families and methods keep, for a plugin's own tests too.

from otl.testing import CHECKS, METHOD_CHECKS

@pytest.mark.parametrize("check", CHECKS)
def test_my_family(check):
    check(lambda: MyFamily("path/of/a/tiny/checkpoint"))
"""

from otl.testing.families import CHECKS as CHECKS
from otl.testing.families import check_family as check_family
from otl.testing.inputs import US as US
from otl.testing.inputs import Factory as Factory
from otl.testing.inputs import a_batch as a_batch
from otl.testing.inputs import adapt as adapt
from otl.testing.methods import METHOD_CHECKS as METHOD_CHECKS
from otl.testing.methods import Made as Made
from otl.testing.methods import check_method as check_method
from otl.testing.methods import predicted as predicted
