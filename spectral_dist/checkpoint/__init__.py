"""Save, load and reshard a model and its optimizer, in plain torch; converters."""

from spectral_dist.checkpoint.dcp import (
    async_save,
    check_matrix_state,
    load,
    load_matrix_state,
    load_state_dict,
    matrix_state,
    save,
    save_matrix_state,
    state_dict,
)

__all__ = [
    "async_save",
    "check_matrix_state",
    "load",
    "load_matrix_state",
    "load_state_dict",
    "matrix_state",
    "save",
    "save_matrix_state",
    "state_dict",
]
