"""What can go wrong: the faults of the matrix, what happens then, and the tests that prove it.

The page about reliability is rendered from this and from the suites' last results.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Case:
    """One fault. ``proof`` are tests as "file::name" under tests; none: it is a limit, said so."""

    what: str
    happens: str
    guaranteed: str
    proof: tuple[str, ...] = ()


CRASH = "faults/test_crash_points.py::test_who_dies_at_a_point_is_not_missed"
STORM = "faults/test_kill_storm.py::test_twenty_kills_change_nothing"
SAME = "adapters, moments, memories and scores are those of a run without it, bit for bit"
UNTOUCHED = "nothing has changed at the server"


class Fault(Enum):
    """The rows of the matrix."""

    F01 = Case(
        "a client is killed at any point of a turn",
        "it is started again, and its turn begins anew from what both sides count",
        SAME,
        (CRASH, "network/test_faults.py::test_a_client_that_is_killed_in_mid_round_comes_back"),
    )
    F02 = Case(
        "a server is killed before, while or after it carries a message out",
        "it goes on from its newest checkpoint; clients dial again and begin the turn anew",
        SAME,
        (CRASH, "network/test_faults.py::test_a_server_that_is_killed_in_mid_round_goes_on"),
    )
    F03 = Case(
        "a server is killed around a merge",
        "the round counts wholly or not at all",
        SAME,
        (CRASH,),
    )
    F04 = Case(
        "anybody is killed in the middle of a write",
        "the file before it counts; what is half-written is removed at the next start",
        "no checkpoint and no memory is unreadable, no file is left over",
        (CRASH, "test_leftovers.py::test_every_folder_is_swept_by_its_owner"),
    )
    F05 = Case(
        "200 kills of anybody at any moment",
        "each is started again",
        "what is committed after each round is what the clean run committed",
        (STORM,),
    )
    F06 = Case(
        "SIGTERM, SIGINT",
        "what counts is on disk; exit code 0, 130; a client that SIGTERM ends is waited for as if "
        "its connection were lost, and one that Ctrl-C ends is not",
        f"{SAME}, unless it is Ctrl-C at a client",
        (
            "network/test_faults.py::test_who_is_asked_to_end_ends_well",
            "network/test_policy.py::test_whom_its_system_ends_has_the_patience_of_a_lost_connection",
        ),
    )
    F07 = Case(
        "a machine sleeps and wakes",
        "its connection is given up and made again; the turn goes on where it was",
        SAME,
        ("network/test_faults.py::test_a_stopped_machine_wakes_up_and_goes_on",),
    )
    F08 = Case(
        "the way is cut for some seconds, or for ever",
        "noticed on both sides; the stream goes on where it was; who stays away fails its turn",
        SAME + ", if it comes back within the patience",
        (
            "faults/test_liveness.py::test_a_cable_that_is_pulled",
            "faults/test_liveness.py::test_a_cable_that_is_pulled_changes_nothing_of_what_is_learned",
            "network/test_faults.py::test_a_link_that_is_dark_for_a_while_costs_nothing_but_time",
            "network/test_faults.py::test_who_stays_away_is_not_waited_for",
        ),
    )
    F09 = Case(
        "only one direction is cut",
        "as if both were",
        "noticed on both sides",
        ("faults/test_liveness.py::test_a_black_hole",),
    )
    F10 = Case(
        "a peer is gone without a word",
        "noticed by keepalive within 3 seconds (lan)",
        "the others keep their pace",
        (
            "network/test_liveness.py::test_a_half_open_peer_is_noticed_on_both_sides_and_all_goes_on_when_it_is_back",
            "faults/test_liveness.py::test_the_others_keep_their_pace_while_one_is_dark",
        ),
    )
    F11 = Case(
        "packets come late and in pieces",
        "nothing but time is lost",
        "each step counts once",
        ("faults/test_exactly_once.py::test_ten_thousand_steps_count_once_each",),
    )
    F12 = Case(
        "a client reads slowly or not at all",
        "who does not read is not read from, and is let go after a minute",
        "what waits for one client at the server is bounded",
        ("network/test_abuse.py::test_who_does_not_read_is_not_read_from_and_let_go",),
    )
    F13 = Case(
        "resets at any byte, lost answers, single bytes",
        "what was asked and not answered is asked again, and answered from the step table",
        "each step counts once",
        (
            "faults/test_exactly_once.py::test_ten_thousand_steps_count_once_each",
            "network/test_faults.py::test_connections_that_break_again_and_again",
        ),
    )
    F14 = Case(
        "a client is much slower than the others",
        "with --deadline the round ends without it; its late result is refused with the round",
        "it goes on from what counts",
        ("network/test_policy.py::test_a_late_result_is_refused_with_the_number_of_its_round",),
    )
    F15 = Case(
        "more callers than there is room for",
        "told in how many seconds to come back, which clients obey",
        "who is in goes on",
        (
            "network/test_abuse.py::test_too_many_calls_are_told_when_to_come_back",
            "network/test_abuse.py::test_an_honest_client_comes_back_when_it_was_told",
        ),
    )
    F16 = Case(
        "clocks jump",
        "waiting is measured by the monotonic clock; certificates are judged by the wall clock",
        "a certificate that is not in force is told as that",
        ("link/test_diagnosis.py::test_what_expires_while_a_link_dials_is_seen",),
    )
    F17 = Case(
        "a message comes twice",
        "its answer comes again from the step table",
        "it is carried out once",
        ("server/test_steps.py::test_a_repeated_message_gets_the_answer_it_got_before",),
    )
    F18 = Case(
        "a recorded connection is played again",
        "its messages are of no turn that is under way",
        UNTOUCHED,
        ("network/test_refusals.py::test_what_is_wrong_in_a_run_changes_nothing_of_it",),
    )
    F19 = Case(
        "another message under the same key",
        "refused, and recorded",
        UNTOUCHED,
        ("server/test_steps.py::test_another_message_under_the_same_key_is_refused",),
    )
    F20 = Case(
        "messages out of order",
        "refused with the step that the client is at",
        UNTOUCHED,
        ("server/test_steps.py::test_a_message_from_a_step_that_is_over_is_refused",),
    )
    F21 = Case(
        "a disk is full",
        "who cannot write says so and ends; the same command goes on when there is room",
        SAME,
        (
            "faults/test_disk.py::test_a_server_whose_disk_is_full_goes_on_when_there_is_room",
            "faults/test_disk.py::test_a_client_whose_disk_is_full_goes_on_when_there_is_room",
            "network/test_watch.py::test_a_disk_that_fills_up_is_told_until_there_is_room_again",
        ),
    )
    F22 = Case(
        "a checkpoint is damaged",
        "the newest one whose digests hold is gone on from, and the others are named",
        SAME,
        (
            "faults/test_kill_storm.py::test_damaged_checkpoints_are_passed_over",
            "test_resume.py::test_a_damaged_checkpoint_is_passed_over",
            "client/test_store.py::test_a_turn_that_is_not_as_it_was_written_is_refused",
        ),
    )
    F23 = Case(
        "the run's own records are damaged",
        "named by `flexp verify`; a server that cannot read its roster does not start",
        "no new record is begun over an old one; that a log is gone is the next one's first line",
        (
            "network/test_damage.py::test_a_log_that_is_lost_is_the_first_line_of_the_next",
            "test_verify.py::test_what_was_changed_is_named",
            "test_audit.py::test_any_change_of_any_byte_is_found",
        ),
    )
    F24 = Case(
        "another version on the other side",
        "refused at hello, with both versions",
        UNTOUCHED,
        (
            "network/test_refusals.py::test_what_is_wrong_in_a_run_changes_nothing_of_it",
            "link/test_frame.py::test_a_client_of_another_version_says_a_field_more",
        ),
    )
    F25 = Case(
        "no certificate, plain text, old TLS",
        "the handshake fails; both sides say why",
        UNTOUCHED,
        ("network/test_refusals.py::test_over_tls_nobody_comes_in_who_may_not",),
    )
    F26 = Case(
        "a certificate of another authority, expired, revoked, or for another use",
        "refused, with the reason on both sides",
        UNTOUCHED,
        (
            "network/test_refusals.py::test_over_tls_nobody_comes_in_who_may_not",
            "identity/test_tls.py::test_grpc_servers_refuse",
        ),
    )
    F27 = Case(
        "certificates are changed while a run goes on",
        "not built: a server takes new files when it is started again, which costs nothing",
        "–",
    )
    F28 = Case(
        "a start-up kit is used again, too old, or changed",
        "refused, and recorded",
        "one certificate for one kit",
        ("identity/test_tokens.py::test_another_request_with_a_used_kit_is_refused",),
    )
    F29 = Case(
        "a client speaks in another's name",
        "the certificate says who it is, not the message",
        UNTOUCHED,
        ("network/test_refusals.py::test_over_tls_nobody_comes_in_who_may_not",),
    )
    F30 = Case(
        "two processes with one identity",
        "the newest counts once its owner has agreed; the other one ends",
        "their messages never mix",
        (
            "network/test_refusals.py::test_of_two_processes_with_one_name_the_newest_counts",
            "network/test_odd.py::test_who_has_not_agreed_yet_takes_nobodys_place",
        ),
    )
    F31 = Case(
        "another model, tokenizer, cut or rank",
        "refused by its digest",
        UNTOUCHED,
        ("network/test_refusals.py::test_what_is_wrong_in_a_run_changes_nothing_of_it",),
    )
    F32 = Case(
        "a client asks for what is another's",
        "there is no message for it: a call reads its own tenancy",
        UNTOUCHED,
        ("network/test_refusals.py::test_what_is_wrong_in_a_run_changes_nothing_of_it",),
    )
    F33 = Case(
        "NaN or infinity from a client",
        "refused at the door, by the names of tensor and client; an honest client skips the step",
        UNTOUCHED,
        ("server/test_finite.py::test_an_odd_number_is_refused_by_name_and_changes_nothing",),
    )
    F34 = Case(
        "tensors of another shape, type or size",
        "refused before anything is made for them",
        UNTOUCHED,
        (
            "link/test_frame.py::test_headers_that_lie_are_refused",
            "link/test_frame.py::test_a_tensor_that_is_not_there_takes_no_memory",
        ),
    )
    F35 = Case(
        "messages without end, or larger than the plan's largest",
        "refused before they have come",
        "memory of at most twice what came, and 1 MiB",
        (
            "network/test_refusals.py::test_a_long_frame_is_refused_before_it_has_come",
            "link/test_frame.py::test_no_frame_takes_much_more_memory_than_it_has_bytes",
        ),
    )
    F36 = Case(
        "a thousand connections that say nothing",
        "closed after ten seconds; beyond the cap nobody comes in",
        "clients go on; an honest newcomer may have to wait for those ten seconds",
        ("faults/test_abuse.py::test_a_thousand_idle_connections",),
    )
    F37 = Case(
        "500 silent sockets, half handshakes",
        "closed after three seconds",
        "clients go on",
        ("faults/test_abuse.py::test_silent_sockets_and_half_hellos",),
    )
    F38 = Case(
        "streams opened and cancelled, pings, bad handshakes by the thousand",
        "the connection is closed",
        "the log stays bounded, nothing stays in memory",
        (
            "network/test_abuse.py::test_streams_that_are_opened_and_cancelled_leave_nothing",
            "faults/test_abuse.py::test_ten_thousand_bad_handshakes",
        ),
    )
    F39 = Case(
        "no data, or rounds in which nobody trains",
        "refused before anything starts; an empty round changes nothing",
        "no number is NaN",
        (
            "test_odd_data.py::test_data_without_rows_is_refused",
            "network/test_policy.py::test_a_round_may_end_without_a_reply",
        ),
    )
    F40 = Case(
        "one row, one class, a batch larger than the data",
        "trains, or is refused with what to do",
        "metrics that cannot be measured are null",
        ("test_odd_data.py::test_a_batch_larger_than_the_data_is_all_of_it",),
    )
    F41 = Case(
        "hostile data files",
        "taken or refused, by file, line, byte and offset",
        "the same for any chunk size; at most 64 MiB; no word of a row is told",
        (
            "data/test_hostile_files.py::test_hostile_data_is_taken_or_refused_alike_and_nothing_is_told",
            "data/test_hostile_files.py::test_no_file_takes_64_mib_before_it_is_refused",
        ),
    )
    F42 = Case(
        "control tokens spelt out in a row",
        "they are text",
        "only the program's own tokens are special",
        ("data/test_tasks.py::test_no_column_of_no_task_can_hold_a_control_token",),
    )
    F43 = Case(
        "hostile recipes",
        "all problems at once, exit code 2",
        "nothing is started or written",
        ("test_recipe_file.py::test_the_command_ends_with_2_and_leaves_nothing",),
    )
    F44 = Case(
        "memory runs out at a client",
        "a turn that does not fit is refused at planning",
        "a client of BERT-tiny runs within a limit of its addresses",
        ("network/test_small.py::test_bert_tiny_over_the_network_within_a_small_memory",),
    )
    F45 = Case(
        "a port is taken, a folder is in use, files run out",
        "a typed error at the start",
        "nothing is half started",
        (
            "network/test_abuse.py::test_two_servers_on_one_port_are_an_error",
            "network/test_odd.py::test_two_servers_do_not_share_a_folder",
        ),
    )
    F46 = Case("secure aggregation loses somebody", "not built yet", "–")
    F47 = Case("clients that lie in earnest", "not built yet: only what is not finite", "–")
    F48 = Case(
        "a server is restarted again and again",
        "everybody is back each time",
        "no call, thread or tenancy is left over",
        (
            "network/test_liveness.py::test_a_server_that_is_restarted_again_and_again_has_everybody_back",
            "faults/test_liveness.py::test_a_server_that_is_killed_twenty_times_has_everybody_back",
        ),
    )
    F49 = Case(
        "checkpoints of an older version",
        "refused with both formats; there is no older one yet that could be converted",
        "never overwritten",
        ("test_resume.py::test_no_usable_checkpoint_is_an_error_that_names_each",),
    )
    F50 = Case(
        "hours with clients that come and go",
        "memory, threads and files stay where they were",
        "at most 1 MiB more per 1,000 steps",
        ("faults/test_soak.py::test_who_comes_and_goes_leaves_nothing_behind",),
    )
