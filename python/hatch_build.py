"""Puts a static shmctl into a wheel: ONECOPY_SHMCTL names it, ONECOPY_WHEEL_TAG the platform.

Without them the wheel is pure Python, so that "pip install ./python" needs no Go.
build_wheels.sh makes both platforms' wheels.
"""

import os

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShmctlHook(BuildHookInterface):
    def initialize(self, version, build_data):
        binary = os.environ.get("ONECOPY_SHMCTL")
        if binary and self.target_name == "wheel":
            build_data["shared_scripts"][os.path.abspath(binary)] = "shmctl"
            build_data["tag"] = "py3-none-" + os.environ["ONECOPY_WHEEL_TAG"]
            build_data["pure_python"] = False
