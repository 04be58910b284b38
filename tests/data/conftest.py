"""What is killed and made again is the same to the last bit on one thread."""

from tests.training.conftest import _one_thread  # noqa: F401
