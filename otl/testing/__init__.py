"""The contract that families and methods keep, for a plugin's own tests too.

from otl.testing import CHECKS, METHOD_CHECKS

@pytest.mark.parametrize("check", CHECKS)
def test_my_family(check):
    check(lambda: MyFamily("path/of/a/tiny/checkpoint"))

And of a family with every method, from the settings to what other programs read: `otl.testing.prove`.
"""

from otl.testing.cells import METHODS as METHODS
from otl.testing.cells import Cell as Cell
from otl.testing.cells import Names as Names
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
from otl.testing.proofs import PROOFS as PROOFS
from otl.testing.proofs import Impossible as Impossible
from otl.testing.proofs import prove as prove
