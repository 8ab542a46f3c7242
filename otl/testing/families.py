"""The family contract, one function for each property; for a plugin's own tests too, with or without pytest.

@pytest.mark.parametrize("check", CHECKS)
def test_the_contract(check):
    check(lambda: MyFamily("path/of/a/tiny/checkpoint"))
"""

from __future__ import annotations

from collections.abc import Callable

from otl.testing.declared import (
    check_constructor_only_stores,
    check_declared,
    check_loads_frozen,
    check_presets_find_layers,
)
from otl.testing.denoising import (
    check_bf16,
    check_draw,
    check_gradient_checkpointing,
    check_predict_batch,
    check_predict_depends,
    check_predict_shape,
)
from otl.testing.encoding import (
    check_decode_shape,
    check_encoders_load_alone,
    check_identities,
    check_image_batch,
    check_image_deterministic,
    check_image_shape,
    check_prompt_batch,
    check_prompt_shape,
)
from otl.testing.inputs import Factory
from otl.testing.noising import check_loss, check_noise_recoverable, check_noise_shares, check_noise_snr
from otl.testing.planning import check_skeleton_runs, check_skeleton_shapes
from otl.testing.training import check_gradients, check_lora_file, check_state_dict

CHECKS = (
    check_declared,
    check_constructor_only_stores,
    check_loads_frozen,
    check_presets_find_layers,
    check_image_shape,
    check_image_deterministic,
    check_image_batch,
    check_decode_shape,
    check_prompt_shape,
    check_prompt_batch,
    check_identities,
    check_encoders_load_alone,
    check_predict_shape,
    check_predict_depends,
    check_predict_batch,
    check_gradient_checkpointing,
    check_bf16,
    check_noise_recoverable,
    check_noise_snr,
    check_noise_shares,
    check_loss,
    check_gradients,
    check_state_dict,
    check_lora_file,
    check_skeleton_shapes,
    check_skeleton_runs,
    check_draw,
)


def check_family(factory: Factory) -> None:
    """Every check of CHECKS; one AssertionError tells of all that fail."""
    errors = {check.__name__: error for check in CHECKS if (error := failure(check, factory)) is not None}
    if errors:
        listed = "\n".join(f"  {name}: {type(error).__name__}: {error}" for name, error in errors.items())
        first = next(iter(errors.values()))
        raise AssertionError(f"{len(errors)} of {len(CHECKS)} checks of the family fail:\n{listed}") from first


def failure(check: Callable[[Factory], None], factory: Factory) -> Exception | None:
    try:
        check(factory)
    except Exception as error:
        return error
    return None
