"""What is sabotaged, and what must fail for it. `old` is in its file exactly once."""

from __future__ import annotations

from typing import Final, NamedTuple

HOSTILE: Final = "tests.hostile "


class Sabotage(NamedTuple):
    file: str
    old: str
    new: str
    test: str  # as pytest takes it; or HOSTILE and the name of an attack, or a part of it


_ESCAPE = "tests/test_sandbox_escape.py::"
_ATTACKS = f"{_ESCAPE}test_attacks_are_refused"
_FOREIGN = f"{_ESCAPE}test_calls_of_another_architecture_kill"
_LAUNCHER = "tests/test_sandbox_launcher.py::"
_IDENTITY = "tests/test_sandbox_identity.py::"
_EXPORTS = "tests/test_controller_exports.py::"
_RIGHTS = "tests/test_controller_export_rights.py::"
_LEASES = "tests/test_controller_export_ends.py::"
_BOUNDS = "tests/test_controller_bounds.py::"
_ATTENTION = "tests/test_controller_attention.py"
_SWAPPING = "tests/test_swapping_who_gives_way.py::"
_RINGS = "tests/test_rings.py::"
_CGROUPS = "tests/test_cgroups.py::"
_OF_INFERLETS = "tests/test_cgroups_inferlets.py::"

# beside these, tests/test_sandbox_escape.py sabotages the policies sixteen times in every run
SABOTAGES = [
    # --- policies ---
    Sabotage("host/sandbox/policies/native.toml",
             'prlimit64 = [[{ arg = 0, in = [0] }, { arg = 2, in = [0], wide = true }]]',
             'prlimit64 = [[{ arg = 0, in = [0] }]]', _ATTACKS),
    Sabotage("host/sandbox/policies/native.toml",
             'tgkill = [[{ arg = 0, in = ["pid"] }]]', 'tgkill = [[]]',
             _ATTACKS),
    Sabotage("host/sandbox/policies/python.toml",
             'socketpair = [[{ arg = 0, in = [1] }]]', 'socketpair = [[]]', _ATTACKS),
    Sabotage("host/sandbox/policies/python.toml",
             'sendto = [[{ arg = 3, mask = 0xFFFFBFBF', 'sendto = [[{ arg = 3, mask = 0xFFFFBFBE',
             _ATTACKS),
    Sabotage("host/sandbox/policies/common.toml",
             'absent = ["clone3", "execve", "execveat"]', 'absent = ["clone3", "execve"]',
             _ATTACKS),
    Sabotage("host/sandbox/policies/common.toml", '"chroot", ', '', _ATTACKS),
    # --- the compiler of filters ---
    Sabotage("host/sandbox/bpf.py", "_Op(_JEQ, ARCH_X86_64, if_true=1)",
             "_Op(_JEQ, ARCH_X86_64, if_true=1, if_false=1)", _FOREIGN),
    Sabotage("host/sandbox/bpf.py", "add(X32_BIT, [_Op(_RET, foreign)])",
             "add(X32_BIT, [_Op(_RET, unknown)])", _FOREIGN),
    Sabotage("host/sandbox/bpf.py", "for half in (1, 0) if condition.wide else (0,):",
             "for half in (0,):", _ATTACKS),
    Sabotage("host/sandbox/bpf.py", "return [*ops, _Op(_RET, refusal)]",
             "return [*ops, _Op(_RET, ALLOW)]", _ATTACKS),
    # --- the set-up of a child ---
    Sabotage("host/sandbox/child.py",
             'calls.add("descriptors", "close_range", RESERVED, _U32, 0)', "pass",
             f"{_ESCAPE}test_inherits_exactly_its_descriptors_and_environment"),
    Sabotage("host/sandbox/child.py", '"prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)',
             '"prctl", _PR_SET_PDEATHSIG, 0)',
             f"{_IDENTITY}test_death_with_the_launcher_outlives_the_change_of_user"),
    Sabotage("host/sandbox/child.py", '"prlimit64", 0, resource.RLIMIT_NPROC, both, 0)',
             '"prlimit64", 0, resource.RLIMIT_CORE, both, 0)',
             f"{_IDENTITY}test_threads_are_counted_for_each"),
    Sabotage("host/sandbox/child.py", "resource.RLIMIT_NOFILE: limits.open_files,", "",
             f"{_LAUNCHER}test_limits_hold"),
    Sabotage("host/sandbox/child.py", "resource.RLIMIT_AS: limits.address_space,", "",
             f"{_LAUNCHER}test_limits_hold"),
    Sabotage("host/sandbox/child.py", "values[resource.RLIMIT_CPU] = limits.cpu_seconds", "pass",
             f"{HOSTILE}processor time on"),
    Sabotage("host/sandbox/child.py", "resource.RLIMIT_CORE: 0,", "", f"{HOSTILE}leaves a core"),
    Sabotage("host/sandbox/child.py",
             'calls.add("capabilities", "capset", calls.pointer(_CAPABILITY_HEADER), data)', "pass",
             f"{_ESCAPE}test_has_no_capabilities"),
    Sabotage("host/sandbox/child.py",
             'calls.add("landlock", "landlock_restrict_self", RULESET_FD, 0)', "pass",
             f"{_ESCAPE}test_landlock_alone_keeps_files_shut"),
    Sabotage("host/sandbox/landlock.py", "_grant(ruleset, path, READ_FILE | READ_DIR)",
             '_grant(ruleset, "/", READ_FILE | READ_DIR)',
             f"{_ESCAPE}test_landlock_alone_keeps_files_shut"),
    Sabotage("host/sandbox/identity.py", "if _is_free(uid):", "if True:",
             f"{_IDENTITY}test_an_id_is_not_given_away_while_a_process_has_it"),
    Sabotage("host/sandbox/identity.py", "if uid in self._taken or not", "if not",
             f"{_IDENTITY}test_two_hosts_never_share_an_id"),
    # --- rings and sealed blocks ---
    Sabotage("host/shm/ring.py", "F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)", "fcntl.F_SEAL_SEAL)",
             f"{_RINGS}test_nobody_can_map_a_sealed_ring_for_writing_not_even_the_host"),
    Sabotage("host/shm/ring.py", "fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)",
             "fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)",
             f"{_RINGS}test_a_ring_in_is_writable_for_the_inferlet_and_keeps_its_size"),
    Sabotage("host/shm/ring.py", "if offset < 0 or length < 0 or offset + length > self.size:",
             "if offset < 0 or length < 0:", f"{_RINGS}test_reads_stay_inside_the_ring"),
    Sabotage("host/shm/ring.py", "return self._map[offset : offset + length]",
             "return memoryview(self._map)[offset : offset + length]",
             f"{_RINGS}test_what_was_read_from_a_ring_in_does_not_change_any_more"),
    Sabotage("host/shm/ring.py", "if offset < 0 or offset + len(data) > self.size:",
             "if offset + len(data) > self.size:", f"{_RINGS}test_writes_stay_inside_the_ring"),
    Sabotage("host/shm/memfd.py", "fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE |", "fcntl.F_SEAL_GROW |",
             f"{_RINGS}test_a_sealed_block_holds_its_bytes_for_ever"),
    # --- what one inferlet may hold in the controller ---
    Sabotage("controller/seat.py", "if self.pages_held + pages > self.limits.kv_pages:",
             "if False:", f"{_RIGHTS}test_imports_count_as_the_importer_s_pages_and_handles"),
    Sabotage("controller/seat.py", "if len(self.kvs) >= self.limits.kv_pages:", "if False:",
             f"{_BOUNDS}test_handles_without_pages_have_a_cap"),
    Sabotage("controller/seat.py", "if size > abi.MAX_FRAME_BYTES:", "if False:",
             f"{HOSTILE}a frame of 65,537"),
    Sabotage("controller/seat.py", "elif flags == abi.FLAG_LONG:", "elif flags & abi.FLAG_LONG:",
             f"{HOSTILE}a command frame"),
    Sabotage("controller/seat.py", "return len(self._backlog) > MAX_BACKLOG_BYTES", "return False",
             f"{_RIGHTS}test_a_flood_of_lists_is_carried_out_in_turns_and_ends_who_does_not_read"),
    Sabotage("controller/seat.py", "(msgspec.MsgspecError, RecursionError, UnicodeDecodeError)",
             "msgspec.MsgspecError", f"{HOSTILE}nesting as deep"),
    Sabotage("controller/requests.py", "if len(seat.queues) >= MAX_QUEUES:", "if False:",
             f"{HOSTILE}more pages, embeds"),
    Sabotage("controller/weights.py", "if self.octets + octets > MAX_QUEUED_BYTES:", "if False:",
             f"{_BOUNDS}test_large_commands_that_wait_have_a_bound_together"),
    Sabotage("controller/controls.py",
             "if seat.embeds_held + c.count > seat.limits.embeds:", "if False:",
             f"{HOSTILE}more pages, embeds"),
    # --- shared pages and exports ---
    Sabotage("controller/exports.py", "        for page in export.pages:\n"
             "            self._pool.retain(page)\n", "",
             f"{_EXPORTS}test_an_export_holds_its_pages_and_imported_handles_stay"),
    Sabotage("controller/exports.py", "        for page in export.pages:\n"
             "            self._pool.release(page)\n", "",
             f"{_LEASES}test_a_lease_that_is_over_frees_the_pages_by_itself"),
    Sabotage("controller/exports.py", "    for page in block.pages:\n"
             "        machine.pages.retain(page)\n", "",
             f"{_EXPORTS}test_an_export_holds_its_pages_and_imported_handles_stay"),
    Sabotage("controller/exports.py", "if held + pages > seat.limits.export_pages:", "if False:",
             f"{_RIGHTS}test_the_cap_counts_what_is_exported_now"),
    Sabotage("controller/exports.py",
             "if self._meta.get(seat.user, 0) + len(meta) > _MOST_META:", "if False:",
             f"{_RIGHTS}test_what_exports_keep_beside_pages_has_a_cap_too"),
    Sabotage("controller/exports.py", "export = self._users.get(user, {}).get(name)",
             "export = next((e for e in self._all() if e.name == name), None)",
             f"{_RIGHTS}test_another_user_s_exports_do_not_exist"),
    Sabotage("controller/pools.py", "return self._references[page] > 1", "return False",
             f"{_RIGHTS}test_nobody_writes_into_exported_pages_until_they_are_one_s_own_again"),
    Sabotage("controller/pools.py", "self._limbo.append(page)", "self._free.append(page)",
             "tests/test_controller_order.py::"
             "test_a_page_freed_after_a_read_is_nobodys_before_that_step_has_left"),
    # --- who gives way, and who is slowed ---
    Sabotage("controller/swapping.py",
             "if self.places.available and (victim := self._next_idle(asker)):",
             "if False and (victim := self._next_idle(asker)):",
             f"{_SWAPPING}test_who_holds_all_pages_and_sleeps_holds_up_nobody"),
    Sabotage("controller/swapping.py",
             "victim = asker if newest.number < asker.number else newest", "victim = asker",
             f"{_SWAPPING}test_when_host_memory_is_full_too_the_newest_is_ended_and_told_so"),
    Sabotage("controller/attention.py", "            return True\n", "            return False\n",
             _ATTENTION),
    Sabotage("controller/attention.py", "            allowance.fill()\n", "            pass\n",
             _ATTENTION),
    Sabotage("controller/loop.py", "            seat.allowance = parent.allowance\n",
             "            pass\n", _ATTENTION),
    Sabotage("controller/batcher.py", "len(flight.seats) > 1 or seat not in flight.seats",
             "flight.seats", _ATTENTION),
    Sabotage("controller/rates.py", "self._level -= count", "pass",
             "tests/test_controller_rates.py"),
    # --- what clients ask of the host ---
    Sabotage("host/clients.py", "self._router.recv_multipart(zmq.NOBLOCK, copy=False)",
             "map(zmq.Frame, self._router.recv_multipart(zmq.NOBLOCK))",
             "tests/test_host_memory.py::test_a_host_without_memory_refuses_new_work_only"),
    # --- control groups and quotas ---
    Sabotage("host/cgroups/limits.py", 'Setting("memory", "memory.limit_in_bytes", memory),',
             'Setting("memory", "memory.limit_in_bytes", "-1"),',
             f"{_CGROUPS}test_a_limit_below_what_is_held_ends_or_is_told_of"),
    Sabotage("host/cgroups/limits.py", 'Setting("cpu", "cpu.cfs_quota_us", str(quota)),',
             'Setting("cpu", "cpu.cfs_quota_us", "-1"),',
             f"{_OF_INFERLETS}test_processor_time_is_held_to_its_quota"),
    Sabotage("host/cgroups/groups.py",
             "if any(_private_memory(int(pid), most) > most for pid in pids):",
             "if False:", f"{_CGROUPS}test_who_holds_too_much_when_it_joins_is_told_of"),
    Sabotage("host/allotment.py", "if ceiling is not None and exceeds(number, ceiling.value):",
             "if False:", "tests/test_quota_config.py::test_no_launch_goes_beyond_it"),
]  # fmt: skip
