"""Settings every test runs under: eight virtual devices, and no silent casts."""

import jax

# Eight virtual CPU devices, so that every mesh shape up to (2, 2, 2) is real in tests.
jax.config.update("jax_num_cpu_devices", 8)
