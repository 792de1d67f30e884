"""Where the checkout's folders lie in an installed package: its tools, examples and DeepSpeed configs are inside.

``python -m megatron_nepa.tools.doctor`` is there what ``python tools/doctor.py`` is in a checkout.
"""

from setuptools import find_packages, setup

INSIDE = {f"megatron_nepa.{folder}": folder for folder in ("tools", "examples", "ds_configs")}

setup(
    packages=[*find_packages(include=["megatron_nepa", "megatron_nepa.*"]), *INSIDE],
    package_dir=INSIDE,
    package_data={"megatron_nepa.ds_configs": ["*.json"]},
    py_modules=["pretrain_nepa"],
)
