# SPDX-License-Identifier: Apache-2.0
"""The life of all daemons: until a signal, and with a changed configuration at SIGHUP.

What can follow a change does, and the rest is said.
"""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import sdnotify
import trio

from lazysnap import config as configuration
from lazysnap import log
from lazysnap.config import Config
from lazysnap.errors import LazysnapError
from lazysnap.lifetime import plain_errors, stop_at
from lazysnap.registry.client import Registry
from lazysnap.settings import registry_settings
from lazysnap.shard.settings import ShardSettings, write_settings
from lazysnap.supervisor import Supervisor

_log = log.get(__name__)
# A worker that is busy takes them up a little later.
_RELOAD_SECONDS = 10.0


class Reload:
    """Takes up a changed configuration, as far as that is possible without a restart.

    Args:
        config: in force.
        root: where workers find their settings.
        registry: the daemon's client.
        supervisor: of the shards.
        settings_for_shards: makes of a configuration the settings that workers of shards read.
    """

    def __init__(
        self,
        config: Config,
        root: str,
        registry: Registry,
        supervisor: Supervisor,
        settings_for_shards: Callable[[Config], ShardSettings],
    ) -> None:
        self._config = config
        self._root = root
        self._registry = registry
        self._supervisor = supervisor
        self._settings_for_shards = settings_for_shards

    async def take_up(self, new: Config) -> None:
        """Put a configuration in force.

        Raises:
            Internal: the settings of the workers cannot be written.
        """
        changed = configuration.changed(self._config, new)
        for key in changed:
            values = {"was": key.value(self._config), "now": key.value(new)}
            if key.reloads:
                _log.info("configuration changed", key=key.path, **values)
            else:
                _log.warning("this change takes a restart", key=key.path, **values)
        self._config = config = configuration.reloaded(self._config, new)
        log.setup(config.log_level, config.log_format)
        write_settings(self._root, self._settings_for_shards(config))
        self._registry.apply(registry_settings(config))
        answers = await self._supervisor.ask_all(
            lambda each: each.reload(), timeout=_RELOAD_SECONDS
        )
        for shard in (number for number, answer in answers.items() if answer is None):
            # The next worker reads them anyway.
            _log.warning("shard goes on with the settings it has", shard=shard)
        _log.info("configuration reloaded", changes=len(changed))

    async def at(self, hangups: AsyncIterator[object], load: Callable[[], Config]) -> None:
        """At each SIGHUP, for ever: a file that is wrong changes nothing.

        Args:
            hangups: yields once for each.
            load: reads the configuration.
        """
        systemd = sdnotify.SystemdNotifier()
        async for _ in hangups:
            # protocol: sd_notify(3), RELOADING
            systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                await self.take_up(load())
            except LazysnapError as error:
                _log.error("configuration not reloaded", error=error, hint=error.hint or "")
            finally:
                systemd.notify("READY=1")


async def run_until_stopped(
    serve: Callable[..., Awaitable[None]], load: Callable[[], Config]
) -> None:
    """Run a daemon until SIGTERM or SIGINT, and reload its configuration at SIGHUP.

    Args:
        serve: does its work until cancelled; tells `task_status` its `Reload` when it is ready.
        load: reads the configuration.

    Raises:
        LazysnapError: something that is needed does not work.
    """
    with (
        plain_errors(),
        trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals,
        trio.open_signal_receiver(signal.SIGHUP) as hangups,
    ):
        async with trio.open_nursery() as nursery:
            # Also while starting, which can take long.
            nursery.start_soon(stop_at, signals, nursery)
            reload: Reload = await nursery.start(serve)
            sdnotify.SystemdNotifier().notify("READY=1")
            await reload.at(hangups, load)
