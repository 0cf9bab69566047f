"""Faults that break a privacy or security claim, each with the tests that must catch it.

`test_mutants.py` builds each fault in a copy of the project and runs its tests. A fault that no test catches is a gap
in the tests. Each row of `MUTANTS` names a claim by its fault, so a new claim gets a new row.
"""

from __future__ import annotations

from dataclasses import dataclass

SECAGG, MECHANISMS = "tests/privacy/secagg/", "tests/privacy/test_mechanisms.py::"
PROTOCOL, REFUSALS = SECAGG + "test_protocol.py::", SECAGG + "test_refusals.py::"
MASKED_SUM, LEDGER = SECAGG + "test_masked_sum.py::", "tests/core/test_privacy_ledger.py::"


@dataclass(frozen=True)
class Change:
    """A change of one place in one file.

    Args:
        path: path of the file in the repository.
        old: text that occurs once in the file.
        new: text in its place.
    """

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Args:
        name: description of the fault, in a few words.
        changes: changes that make the fault.
        tests: test files or tests of which at least one must fail.
    """

    name: str
    changes: tuple[Change, ...]
    tests: tuple[str, ...]


def fault(name: str, path: str, old: str, new: str, *tests: str, also: tuple[Change, ...] = ()) -> Mutant:
    """Return a fault at one place of a file, and at further places if the fault needs them."""
    return Mutant(name, (Change(path, old, new), *also), tests)


CENTRAL = "fedlearn/privacy/mechanisms/central_dp.py"
LOCAL = "fedlearn/privacy/mechanisms/local_dp.py"
FTRL = "fedlearn/privacy/mechanisms/dp_ftrl.py"
LOSSES = "fedlearn/privacy/loss_distributions.py"
CLIENT = "fedlearn/privacy/secagg/client.py"
SERVER = "fedlearn/privacy/secagg/server.py"
CRYPTO = "fedlearn/privacy/secagg/crypto.py"
SUM = "fedlearn/privacy/secagg/masked_sum.py"
DISCRETE = "fedlearn/privacy/secagg/discrete_noise.py"
REFUSAL_LOG = "fedlearn/deploy/node_side/refusal_log.py"
SERVICE, QUERIES = "fedlearn/deploy/node_side/service.py", "fedlearn/deploy/node_side/query_log.py"
GATE, DEPLOYED = "tests/deploy/node_side/test_gate.py::", "tests/engines/test_deployed_privacy.py::"

SITES, CHOICES = "tests/engines/test_deployed_sites.py::", "tests/deploy/coordinator_side/test_run_sites.py::"
RUN_SITES = "fedlearn/deploy/coordinator_side/run_sites.py"

BUILDERS, CONSENT = "fedlearn/runner/builders.py", "fedlearn/runner/consent.py"
PLAIN, BOUNDS = "fedlearn/runner/plain_values.py", "fedlearn/deploy/node_side/bounds.py"
SUBMITTED = "fedlearn/deploy/coordinator_side/submitted_settings.py"
REGISTRY, CONSENTS = "tests/runner/test_registry.py::", "tests/runner/test_consent.py::"
ORDERS = "tests/deploy/node_side/test_order_settings.py::"
HOSTILE = "tests/deploy/node_side/test_hostile_orders.py::"
SUBMISSIONS = "tests/deploy/test_submitted_settings.py::"

JAX, JAX_STEPS = "fedlearn/trainers/jax/", "tests/trainers/test_jax_example_privacy.py::"

AVERAGING = "tests/trainers/test_optimizer_averaging.py::"
LOCAL_STEPS = "tests/strategies/test_local_steps.py::"

MUTANTS: tuple[Mutant, ...] = (
    # the mechanism at the server
    fault(
        "central: noise is divided by the square root of the cohort",
        CENTRAL,
        "    std = noise * bound / cohort\n",
        "    std = noise * bound / cohort / cohort**0.5\n",
        MECHANISMS + "test_released_minus_noiseless_has_the_promised_standard_deviation",
    ),
    fault(
        "central: the client half does not clip",
        CENTRAL,
        "        return clip_finite(update, bound), state\n\n    def add_noise(update_D",
        "        return update, state\n\n    def add_noise(update_D",
        MECHANISMS + "test_one_client_moves_the_unnoised_aggregate_by_no_more_than_it_may",
    ),
    fault(
        "central: cohorts of a fixed size are accounted for as Poisson cohorts",
        CENTRAL,
        'return Event(noise / 2, "fixed_size", rate)',
        'return Event(noise, "poisson", rate)',
        MECHANISMS + "test_fixed_size_cohorts_are_accounted_under_replacement_at_half_the_multiplier",
    ),
    fault(
        "central: a smaller federation keeps the size of Poisson cohorts",
        CENTRAL,
        "return poisson(rate=cohort / num_clients)",
        "return poisson(cohort)",
        MECHANISMS + "test_the_law_that_is_accounted_for_stays_where_clients_go",
    ),
    fault(
        "central: training metrics leave without noise",
        CENTRAL,
        '    refuse_extra_uploads(strategy, "central")\n',
        "",
        MECHANISMS + "test_unsound_combinations_are_refused_with_the_reason_and_the_fix",
    ),
    fault(
        "central: weights by example counts are accepted",
        CENTRAL,
        '    refuse_unequal_weights(strategy, "central")\n',
        "",
        MECHANISMS + "test_f3_weights_by_examples_are_refused_with_the_setting_to_change",
    ),
    fault(
        "central: a NaN turns clipping off",
        CENTRAL,
        "return clipped(xp.where(xp.isfinite(update), update, xp.zeros_like(update)), clip_norm)",
        "return clipped(update, clip_norm)",
        MECHANISMS + "test_f5_a_number_that_is_not_finite_does_not_switch_clipping_off",
    ),
    fault(
        "adaptive clip: noise follows the clip norm after its change",
        CENTRAL,
        'bound, draws = float(state["clip_norm"][0]), standard_normals(update.shape, context)',
        'bound, draws = 2 * float(state["clip_norm"][0]), standard_normals(update.shape, context)',
        MECHANISMS + "test_f2_noise_has_the_clip_norm_that_the_updates_were_clipped_to",
    ),
    fault(
        "adaptive clip: the count of unclipped updates has no noise",
        CENTRAL,
        "share = float(update[-1]) + std_bits / cohort * draws[-1] + 0.5",
        "share = float(update[-1]) + 0.5",
        MECHANISMS + "test_the_adaptive_clip_norm_moves_by_the_noise_that_is_accounted_for",
    ),
    fault(
        "noise: simulated noise does not depend on the round",
        "fedlearn/privacy/gaussian_noise.py",
        "Purpose.NOISE, round=context.round, client",
        "Purpose.NOISE, round=0, client",
        MECHANISMS + "test_an_empty_poisson_cohort_is_a_round_that_releases_noise_and_is_paid_for",
    ),
    fault(
        "noise: clients and server share a stream",
        "fedlearn/privacy/gaussian_noise.py",
        "client=0 if client is None else client + 1)",
        "client=client or 0)",
        MECHANISMS + "test_noise_of_clients_and_server_never_coincides",
    ),
    fault(
        "noise: deployed noise follows from the seed",
        "fedlearn/privacy/gaussian_noise.py",
        "    if context.deployed:\n",
        "    if context.deployed and context.seed < 0:\n",
        MECHANISMS + "test_f14_deployed_noise_does_not_follow_from_any_seed",
    ),
    fault(
        "noise: secret noise comes from the global generator of NumPy",
        "fedlearn/core/random.py",
        "    bits = np.frombuffer(os.urandom(8 * int(np.prod(shape))), np.uint64)\n",
        "    bits = np.frombuffer(np.random.bytes(8 * int(np.prod(shape))), np.uint64)\n",
        "tests/core/test_random.py",
    ),
    # local noise
    fault(
        "local: a replaced update counts as C, not 2 C",
        LOCAL,
        "event, delta = Event(noise / 2), budget.delta",
        "event, delta = Event(noise), budget.delta",
        LEDGER + "test_a_local_budget_is_each_clients_own",
    ),
    fault(
        "local: further vectors leave without noise",
        LOCAL,
        '    refuse_extra_uploads(strategy, "local")\n',
        "",
        MECHANISMS + "test_unsound_combinations_are_refused_with_the_reason_and_the_fix",
    ),
    fault(
        "local: clients whose responses were lost pay nothing",
        LOCAL,
        "dict.fromkeys((*release.clients, *release.dropouts), (event, 1))",
        "dict.fromkeys(release.clients, (event, 1))",
        LEDGER + "test_a_reply_that_may_have_been_read_is_paid_for",
    ),
    # correlated noise
    fault(
        "ftrl: the sensitivity counts one participation",
        FTRL,
        "for start in range(0, rounds, separation))\n",
        "for start in range(0, 1, separation))\n",
        MECHANISMS + "test_stopping_ftrl_early_costs_less_and_all_rounds_cost_the_claim",
        "tests/privacy/test_golden_epsilons.py::test_toeplitz_sensitivities_are_the_golden_ones_and_those_of_jax_privacy",
    ),
    fault(
        "ftrl: the tree has one level too few in its sensitivity",
        FTRL,
        "    for level in range(rounds.bit_length()):\n",
        "    for level in range(rounds.bit_length() - 1):\n",
        MECHANISMS + "test_tree_sensitivity_bounds_every_pattern_of_participation",
    ),
    fault(
        "ftrl: a client does not wait",
        FTRL,
        "select=min_separation(cohort, separation)",
        "select=min_separation(cohort, 1)",
        MECHANISMS + "test_the_mechanism_makes_clients_wait_for_the_separation_that_is_accounted_for",
    ),
    fault(
        "ftrl: noise is stretched to more rounds than planned",
        FTRL,
        "if context.round > rounds or not np.isclose",
        "if not np.isclose",
        MECHANISMS + "test_correlated_noise_cannot_be_stretched_to_more_rounds",
    ),
    # accounting
    fault(
        "accounting: losses move to the lower point of the grid",
        LOSSES,
        "upper = np.clip(upper, 0.0, first[1:-1])",
        "upper = np.zeros_like(upper)",
        "tests/privacy/test_loss_distributions.py::test_composition_on_the_grid_has_the_closed_form_of_plain_gaussians",
    ),
    fault(
        "accounting: infinite losses are left out",
        LOSSES,
        "mass, float(first[-1]))",
        "mass, 0.0)",
        "tests/privacy/test_loss_distributions.py::test_a_huge_loss_is_finite_by_divergences_or_infinite",
    ),
    fault(
        "accounting: a cohort of a fixed size has no equal outputs",
        LOSSES,
        "negative.mass[-1] + positive.mass[0] + max(0.0, 1 - first.sum() - second.sum())",
        "negative.mass[-1] + positive.mass[0]",
        "tests/privacy/test_loss_distributions.py::test_both_distributions_of_a_release_are_distributions",
    ),
    fault(
        "accounting: negative losses of a cohort of a fixed size are those of a removal",
        LOSSES,
        "    if _is_fixed_size(event):\n",
        "    if False:\n",
        "tests/privacy/test_golden_epsilons.py::test_sampling_without_replacement_is_accounted_at_twice_the_sensitivity",
    ),
    fault(
        "accounting: calibration looks at one client only",
        "fedlearn/privacy/accounting.py",
        "if place >= 0 and cost <= epsilon:",
        "if place >= 0:",
        "tests/privacy/test_calibration.py::"
        "test_calibration_holds_for_each_client_although_the_most_expensive_one_changes",
    ),
    # secure aggregation
    fault(
        "secagg: the self mask is left out at both ends",
        CLIENT,
        "        crypto.add_mask(masked, crypto.self_mask_key(self._state.seed, inbox.session, me), sign=1)\n",
        "",
        SECAGG + "test_masks.py",
        also=(
            Change(
                SERVER,
                "            crypto.add_mask(self._sum, crypto.self_mask_key(seed, self._digest, client), sign=-1)\n",
                "            pass\n",
            ),
        ),
    ),
    fault(
        "secagg: self masks do not depend on the session",
        CRYPTO,
        'return derive(seed, b"own", session, client)',
        'return derive(seed, b"own", client)',
        SECAGG + "test_masks.py",
    ),
    fault(
        "secagg: pairwise masks do not depend on the session",
        CRYPTO,
        'b"mask", session, min(client, peer), max(client, peer))',
        'b"mask", min(client, peer), max(client, peer))',
        SECAGG + "test_masks.py",
    ),
    fault(
        "secagg: the secrets of a client are the same in each round",
        CLIENT,
        "encryption_secret, mask_secret = crypto.generate_secret(), crypto.generate_secret()",
        'encryption_secret, mask_secret = crypto.derive(self.identity.secret, b"a")[:16], '
        'crypto.derive(self.identity.secret, b"b")[:16]',
        SECAGG + "test_masks.py",
    ),
    fault(
        "secagg: the seed of the self mask is the same in each round",
        CLIENT,
        "            seed=crypto.generate_secret(),\n",
        '            seed=crypto.derive(self.identity.secret, b"c")[:16],\n',
        SECAGG + "test_masks.py",
    ),
    fault(
        "secagg: pairwise masks have the same sign",
        CLIENT,
        "sign=1 if me < other else -1",
        "sign=1",
        PROTOCOL + "test_any_dropouts_at_any_stage_down_to_the_threshold_leave_the_exact_sum",
    ),
    fault(
        "secagg: signatures under keys are not verified",
        CLIENT,
        "        crypto.verify_keys(keys, registered)\n",
        "",
        REFUSALS + "test_keys_that_someone_in_between_put_in_place_of_a_clients_are_refused",
    ),
    fault(
        "secagg: a kept signature is valid for other messages",
        CRYPTO,
        "len(signature).to_bytes(8), signature, message])",
        "len(signature).to_bytes(8), signature])",
        REFUSALS + "test_a_verified_signature_is_valid_for_its_key_and_its_message_only",
    ),
    fault(
        "secagg: shares have no random coefficients",
        "fedlearn/privacy/secagg/shamir.py",
        "random = os.urandom(SECRET_BYTES * (threshold - 1) * len(secrets))",
        "random = bytes(SECRET_BYTES * (threshold - 1) * len(secrets))",
        SECAGG + "test_shamir.py",
    ),
    fault(
        "secagg: an earlier round of a run is accepted",
        CLIENT,
        'reject_if(same_run and session.round < state.round, f"round {session.round} after round {state.round}")',
        "pass",
        REFUSALS + "test_rounds_only_go_forward",
    ),
    fault(
        "secagg: a round is opened again",
        CLIENT,
        '        reject_if(over, f"round {session.round} is over: it is opened at most once")\n',
        "",
        REFUSALS + "test_a_round_is_opened_once",
    ),
    fault(
        "secagg: a client may be a survivor and a dropout",
        CLIENT,
        "            bool(survivors & dropped),\n",
        "            False,\n",
        REFUSALS + "test_a_client_that_is_said_to_be_both_there_and_gone_is_not_opened",
    ),
    fault(
        "secagg: other survivors than the confirmed ones are opened",
        CLIENT,
        "            (opening.survivors, opening.dropped) != agreed,\n",
        "            False,\n",
        REFUSALS + "test_other_survivors_than_those_confirmed_are_not_opened",
    ),
    fault(
        "secagg: signatures under the survivors are not checked",
        CLIENT,
        "        self._check_signatures(opening, session)\n",
        "",
        REFUSALS + "test_survivors_that_only_some_clients_were_shown_are_not_opened",
    ),
    fault(
        "secagg: secrets stay after the round",
        CLIENT,
        "        self.discard_secrets()\n        return encode(reveal)",
        "        return encode(reveal)",
        REFUSALS + "test_no_secret_is_kept_after_a_round",
    ),
    fault(
        "secagg: the secret of the mask stays after masking",
        CLIENT,
        '            encryption_secret=b"",\n            mask_secret=b"",\n',
        "",
        REFUSALS + "test_secrets_of_masks_are_gone_once_the_vector_is_masked",
    ),
    fault(
        "secagg: keys of another session are accepted",
        CLIENT,
        'reject_if(keys.session != expected, f"the keys of client {client} are of another session")',
        "pass",
        REFUSALS + "test_keys_of_another_session_are_refused",
    ),
    fault(
        "secagg: a public key may appear twice",
        CLIENT,
        '    reject_if(len(set(public)) < len(public), "a public key appears twice")\n',
        "",
        REFUSALS + "test_a_public_key_that_appears_twice_is_refused",
    ),
    fault(
        "secagg: a client takes part below its own threshold",
        CLIENT,
        "        reject_if(threshold < self.min_threshold, too_low)\n",
        "",
        REFUSALS + "test_a_client_may_want_to_be_in_larger_sums_only",
        SECAGG + "test_parties.py",
    ),
    fault(
        "secagg: clients of one key count as several parties",
        CLIENT,
        "        reject_if(not is_same, ",
        "        reject_if(False, ",
        SECAGG + "test_parties.py",
    ),
    fault(
        "secagg: clients of a sum may have different noise",
        CLIENT,
        "        reject_if(not agrees, ",
        "        reject_if(False, ",
        SECAGG + "test_parties.py::test_a_session_with_other_settings_of_noise_is_refused",
    ),
    fault(
        "secagg: a session is checked at its first message only",
        CLIENT,
        "        self._accept_session(current)",
        "        pass",
        SECAGG + "test_parties.py::test_the_keys_may_not_change_to_those_of_one_party_between_messages",
    ),
    fault(
        "secagg: signatures of clients count instead of parties",
        CLIENT,
        "        size = session.num_parties(signers)",
        "        size = len(signers)",
        SECAGG + "test_parties.py::test_a_client_counts_parties_at_each_stage",
    ),
    fault(
        "secagg: noise is sized for clients instead of parties",
        SUM,
        "        parties = min(size, self.num_parties or size)",
        "        parties = size",
        SECAGG + "test_masked_sum.py::test_noise_is_sized_for_the_smallest_sum_with_one_client_per_party",
    ),
    fault(
        "coordinator: a stranger's body is read",
        "fedlearn/deploy/coordinator_side/request_limits.py",
        "_refuse_if(not self.is_node(headers), 401,",
        "_refuse_if(False, 401,",
        "tests/deploy/coordinator_side/test_request_limits.py",
    ),
    fault(
        "coordinator: any token is accepted",
        "fedlearn/deploy/persons.py",
        "if hmac.compare_digest(person.token_sha256, digest) and not person.revoked:",
        "if not person.revoked:",
        "tests/deploy/test_persons.py::test_no_other_token_is_accepted",
    ),
    fault(
        "coordinator: a client belongs to the first node of each run",
        "fedlearn/deploy/coordinator_side/admission.py",
        "            if digest != node.digest and name not in bindings:",
        "            if False:",
        "tests/deploy/coordinator_side/test_admission.py",
    ),
    fault(
        "secagg: one colluding party may split the survivors",
        CLIENT,
        "        reject_if(not is_safe, ",
        "        reject_if(False, ",
        SECAGG + "test_parties.py",
    ),
    fault(
        "secagg: a session of another run is accepted",
        CLIENT,
        "        reject_if(not belongs, ",
        "        reject_if(False, ",
        SECAGG + "test_parties.py::test_a_session_of_another_run_is_refused",
    ),
    fault(
        "secagg: clients of a party sign different survivors",
        CLIENT,
        "        reject_if(bool(others), ",
        "        reject_if(False, ",
        SECAGG + "test_parties.py::test_two_clients_of_a_node_do_not_sign_different_survivors",
    ),
    fault(
        "secagg: the server adds the vector of a client twice",
        SERVER,
        "            client not in self._requested or client in self._responses,\n",
        "            client not in self._requested,\n",
        REFUSALS + "test_a_server_refuses_repetitions_impostors_and_other_sessions",
    ),
    fault(
        "secagg: the shares of a dropout are not checked",
        SERVER,
        "        if crypto.derive_public_key(secret) != self._roster[dropout].mask_key:\n",
        "        if False:\n",
        PROTOCOL + "test_wrong_shares_of_a_dropout_give_no_sum",
    ),
    fault(
        "secagg: sums below the threshold are opened in simulations",
        SUM,
        "        if not threshold <= count <= fixed_point.max_clients:\n",
        "        if not 1 <= count <= fixed_point.max_clients:\n",
        MASKED_SUM + "test_a_round_below_the_threshold_gives_nothing_and_the_next_one_works",
    ),
    fault(
        "secagg: further vectors leave beside the masked one",
        SUM,
        "        if names:\n            raise CompositionError(",
        "        if False:\n            raise CompositionError(",
        MASKED_SUM + "test_vectors_that_would_leave_beside_the_masked_one_are_refused",
    ),
    fault(
        "distributed: the noise is sized for the whole cohort",
        SUM,
        "        std = self.noise_multiplier * self.norm / sqrt(threshold)\n",
        "        std = self.noise_multiplier * self.norm / sqrt(size)\n",
        MASKED_SUM + "test_noise_after_dropouts_down_to_the_threshold_is_what_was_promised_within_2_percent",
    ),
    fault(
        "distributed: the noise of real clients follows from the seed",
        SUM,
        "            if context.deployed\n",
        "            if context.deployed and context.seed < 0\n",
        MASKED_SUM + "test_noise_of_real_clients_does_not_follow_from_the_seed",
    ),
    fault(
        "distributed: updates are not clipped before they become integers",
        SUM,
        "        x_D = clipped(require_finite(x_D), self.clip_norm)\n",
        "        x_D = require_finite(x_D)\n",
        MASKED_SUM + "test_no_update_however_large_moves_the_sum_by_more_than_the_bound",
    ),
    fault(
        "distributed: rounding has no bound on the norm",
        DISCRETE,
        "        if rounded_D @ rounded_D <= norm**2:\n",
        "        if True:\n",
        SECAGG + "test_noise.py::test_rounding_keeps_the_norm_and_moves_no_number_by_one",
    ),
    fault(
        "distributed: the tails of the noise are cut at two standard deviations",
        DISCRETE,
        "    k = np.arange(ceil(12 * std) + 60)\n",
        "    k = np.arange(ceil(2 * std) + 1)\n",
        SECAGG + "test_noise.py::test_noise_has_its_variance_and_its_tails",
    ),
    fault(
        "fixed point: sums may wrap around",
        "fedlearn/privacy/secagg/fixed_point.py",
        '        require(largest < limit, "bits"',
        '        require(largest < 16 * limit, "bits"',
        SECAGG + "test_fixed.py",
    ),
    # the ledger and the loop
    fault(
        "ledger: a checkpoint forgets the clients",
        "fedlearn/core/privacy_ledger.py",
        '        return {"federation": _rows(self.federation), "groups": groups}\n',
        '        return {"federation": _rows(self.federation), "groups": []}\n',
        LEDGER + "test_a_ledger_survives_json_exactly",
    ),
    fault(
        "ledger: a second round of a client costs nothing",
        "fedlearn/core/privacy_ledger.py",
        "    counts[event] = counts.get(event, 0) + int(count)\n",
        "    counts[event] = max(counts.get(event, 0), int(count))\n",
        LEDGER + "test_f20_a_client_pays_for_all_steps_of_all_rounds_that_it_took_part_in",
    ),
    fault(
        "loop: lost responses are not charged",
        "fedlearn/loop/charging.py",
        "    lost = {failure.client for failure in partial.failures if failure.may_have_released}\n",
        "    lost: set[int] = set()\n",
        "tests/loop/test_charging.py",
    ),
    fault(
        "loop: cohorts of real clients follow from the seed",
        "fedlearn/loop/training_loop.py",
        "    if engine.deployed and strategy.privacy_guarantee is not None:\n",
        "    if False:\n",
        "tests/loop",
        "tests/engines/test_deployed_privacy.py",
    ),
    fault(
        "loop: real rounds are charged after their uploads",
        "fedlearn/loop/charging.py",
        "    return engine.deployed and guarantee is not None and guarantee.holds_against_server\n",
        "    return False\n",
        "tests/loop/test_charging.py",
    ),
    fault(
        "loop: a failed round of real clients is free",
        "fedlearn/loop/training_loop.py",
        "        spent = guarantee.charge(state.ledger, actual_release(number, results.partial, cohort))\n",
        "        spent = state.ledger\n",
        "tests/loop/test_charging.py",
    ),
    fault(
        "resume: the ledger of failed rounds is not read",
        "fedlearn/runner/resume.py",
        "        state = LedgerFile(folder).restore(_last_state(experiment, cfg, folder))\n",
        "        state = _last_state(experiment, cfg, folder)\n",
        "tests/cli/test_cli_privacy.py::test_a_resumed_run_has_paid_for_the_uploads_of_failed_rounds",
    ),
    # the node and its gate
    fault(
        "mechanism: protect does not validate",
        "fedlearn/privacy/mechanisms/base.py",
        "    validate(strategy, local)\n    return protect",
        "    return protect",
        DEPLOYED + "test_a_node_refuses_a_strategy_whose_upload_the_mechanism_does_not_cover",
    ),
    fault(
        "gate: responses are not checked",
        SERVICE,
        "                self._check(request, response)\n",
        "",
        GATE + "test_a_handler_that_adds_a_value_cannot_send_it",
    ),
    fault(
        "node: requests may fill the disk",
        "fedlearn/deploy/node_side/disk_limits.py",
        "    return usage.free >= min(MIN_FREE_BYTES, MIN_FREE_SHARE * usage.total)\n",
        "    return True\n",
        "tests/deploy/node_side/test_node_audit.py::test_requests_leave_some_space_on_the_disk_of_a_node",
    ),
    fault(
        "node: a redirection of the coordinator is followed",
        "fedlearn/flower/response_limits.py",
        "    client.follow_redirects = False\n",
        "    client.follow_redirects = True\n",
        "tests/flower/test_response_limits.py::test_a_redirection_reaches_no_other_machine",
    ),
    fault(
        "node: an edit of the data that keeps size and time is not noticed",
        "fedlearn/deploy/node_side/data_files.py",
        "    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino\n",
        "    return status.st_mtime_ns, 0, status.st_size, status.st_ino\n",
        "tests/deploy/node_side/test_data_files.py::test_each_change_in_the_folder_is_noticed",
    ),
    fault(
        "coordinator: all persons read the settings of all runs",
        "fedlearn/deploy/coordinator_side/visibility.py",
        "    if person.role.includes(Role.ADMIN):\n        return [dict(event) for event in events]\n",
        "    if True:\n        return [dict(event) for event in events]\n",
        "tests/deploy/coordinator_side/test_run_api.py"
        "::test_settings_of_a_run_are_for_its_submitter_and_admins_in_each_answer",
    ),
    fault(
        "coordinator: an interrupted run of a revoked person is resumed",
        "fedlearn/deploy/coordinator_side/run_recovery.py",
        "        if self.may_submit(person):\n",
        "        if True:\n",
        "tests/deploy/coordinator_side/test_run_recovery.py"
        "::test_a_run_of_a_person_who_may_start_no_runs_is_not_resumed",
    ),
    fault(
        "gate: details of all refusals leave",
        "fedlearn/protocol/refusals.py",
        '    detail = refusal.detail if refusal.code.has_detail else ""\n',
        "    detail = refusal.detail\n",
        GATE + "test_no_error_at_the_node_reaches_the_coordinator_in_words",
        also=(Change(REFUSAL_LOG, 'detail=detail if code.has_detail else ""', "detail=detail"),),
    ),
    fault(
        "evaluation: reveal.metrics false is ignored",
        SERVICE,
        "        if metrics is False or (metrics == NOISED and is_personal):",
        "        if metrics == NOISED and is_personal:",
        GATE + "test_exact_metrics_leave_only_without_required_privacy_or_by_the_operators_word",
    ),
    fault(
        "evaluation: exact metrics leave under a required privacy",
        "fedlearn/deploy/node_side/policy.py",
        '            return self.required_privacy.minimum == "none"\n',
        "            return True\n",
        GATE + "test_exact_metrics_leave_only_without_required_privacy_or_by_the_operators_word",
    ),
    fault(
        "evaluation: there is no limit",
        QUERIES,
        "            if queries.num_evaluations >= limits.of_run or total >= limits.total:\n",
        "            if False:\n",
        GATE + "test_evaluations_end_at_the_limits_of_a_run_and_of_all_runs",
    ),
    fault(
        "evaluation: many models in one round",
        QUERIES,
        "        is_other = params != queries.params or kind in queries.requests\n",
        "        is_other = False\n",
        GATE + "test_a_node_evaluates_one_model_per_round",
    ),
    fault(
        "evaluation: the evaluated model need not be trained",
        QUERIES,
        "        if round == queries.round + 1 and queries.params and params not in (None, queries.params):\n",
        "        if False:\n",
        GATE + "test_a_run_that_trains_another_model_than_it_evaluated_is_closed",
    ),
    fault(
        "training: a request may have models of single clients for any strategy",
        "fedlearn/deploy/node_side/requested_parts.py",
        "    if bool(order.client_models) != (strategy.aggregate.client_models is not None):\n",
        "    if False:\n",
        "tests/deploy/node_side/test_client_models.py",
    ),
    fault(
        "fedala: the start of a private client depends on data without noise",
        "fedlearn/loop/local_aggregation.py",
        'require(dp is None, "local.example_dp", dp, expected, "strategy=fedavg")',
        "pass",
        "tests/strategies/test_personalization.py::"
        "test_fedala_refuses_example_dp_because_its_start_depends_on_data_without_noise",
    ),
    fault(
        "evaluation: another scenario in the same run",
        QUERIES,
        "    if queries.scenario and queries.scenario != scenario:\n",
        "    if False:\n",
        GATE + "test_a_run_keeps_its_scenario",
    ),
    fault(
        "evaluation: noised metrics have no noise",
        "fedlearn/deploy/node_side/noisy_evaluation.py",
        "confusion + geometric_noise(confusion.shape, 1, epsilon / 2)",
        "confusion",
        GATE + "test_noised_evaluations_have_noise_and_no_exact_value",
    ),
    fault(
        "evaluation: the noise is half as large as it is paid for",
        "fedlearn/deploy/node_side/noisy_evaluation.py",
        "    decay = exp(-epsilon / sensitivity)\n",
        "    decay = exp(-2 * epsilon / sensitivity)\n",
        GATE + "test_the_distribution_of_the_noise_is_the_promised_one",
    ),
    fault(
        "evaluation: noised metrics are free",
        SERVICE,
        "            self.budget.charge_evaluation(clients, epsilon)\n",
        "            pass\n",
        GATE + "test_noised_evaluations_are_paid_for_by_the_nodes_ledger_until_its_limit",
    ),
    fault(
        "node: scenarios are not counted",
        QUERIES,
        "        if len(content.scenarios) >= limit:\n",
        "        if False:\n",
        GATE + "test_a_scenario_that_fails_counts_like_one_that_succeeds",
    ),
    fault(
        "node: a repeated request trains again",
        "fedlearn/deploy/node_side/stored_responses.py",
        "            return response.data if is_equal else None\n",
        "            return None\n",
        GATE + "test_a_repeated_request_gets_the_stored_response_and_is_charged_once",
    ),
    fault(
        "node: a stored response outlives its policy",
        SERVICE,
        "hashlib.sha256(policy.encode())",
        "hashlib.sha256()",
        GATE + "test_a_stored_response_does_not_outlive_the_policy_that_let_it_out",
    ),
    fault(
        "node: training requests are not charged",
        "fedlearn/deploy/node_side/training_admission.py",
        "            self.budget.charge_training(strategy.privacy_guarantee, release)\n",
        "            pass\n",
        GATE + "test_a_request_is_counted_and_charged_on_disk_before_it_trains",
    ),
    fault(
        "node: training requests are not counted",
        "fedlearn/deploy/node_side/training_admission.py",
        "            self.client_states.count_request(run)\n",
        "",
        GATE + "test_a_request_is_counted_and_charged_on_disk_before_it_trains",
    ),
    fault(
        "node: a mechanism without an epsilon is free",
        "fedlearn/deploy/node_side/privacy_budget.py",
        "        if guarantee is None or guarantee.epsilon_of(after) is None or after.histories == before.histories:\n",
        "        if False:\n",
        GATE + "test_a_limit_of_epsilon_refuses_a_mechanism_without_epsilon",
    ),
    fault(
        "node: other users may read its files",
        "fedlearn/core/private_files.py",
        "            os.fchmod(file.fileno(), 0o600)\n",
        "            os.fchmod(file.fileno(), 0o644)\n",
        GATE + "test_a_repeated_request_gets_the_stored_response_and_is_charged_once",
    ),
    fault(
        "node: counts leave that are more precise than the policy",
        "fedlearn/deploy/node_side/gate.py",
        "    unknown += _imprecise_counts(content.metadata if kind == RequestKind.HELLO else {}, policy)\n",
        "",
        GATE + "test_counts_more_precise_than_the_policy_do_not_leave",
    ),
    fault(
        "node: further vectors leave without noise",
        "fedlearn/deploy/node_side/gate.py",
        "    if guarantee is None or guarantee.covers_extra_vectors:\n",
        "    if True:\n",
        GATE + "test_a_further_vector_stays_even_if_a_strategy_with_it_passes_all_other_checks",
    ),
    fault(
        "node: reveal.min_test_examples is ignored",
        SERVICE,
        "self.policy.reveal.min_test_examples)",
        "0)",
        "tests/engines/test_deployed.py",
    ),
    fault(
        "node: the noise on the loss has the sensitivity of a count",
        "fedlearn/deploy/node_side/noisy_evaluation.py",
        "geometric_noise((), LOSS_STEPS, epsilon / 2)",
        "geometric_noise((), 1, epsilon / 2)",
        "tests/deploy/node_side/test_gate.py",
    ),
    fault(
        "node: the noise of clients follows from the seed of the request",
        "fedlearn/deploy/node_side/requested_parts.py",
        "    order = replace(order, local=local, deployed=True)\n",
        "    order = replace(order, local=local)\n",
        "tests/deploy/node_side/test_service.py",
    ),
    fault(
        "node: the required privacy is not checked",
        "fedlearn/deploy/node_side/required_privacy.py",
        '        if self.minimum == "none":\n            return\n        clip, noise',
        "        if True:\n            return\n        clip, noise",
        "tests/deploy/node_side/test_policy.py",
    ),
    fault(
        "node: a masked sum of few nodes is accepted",
        "fedlearn/deploy/node_side/required_privacy.py",
        "        if threshold < self.min_nodes_in_sum:\n",
        "        if False:\n",
        "tests/deploy/node_side/test_policy.py",
        "tests/engines/test_deployed_secagg.py",
    ),
    # the coordinator
    fault(
        "coordinator: a node describes clients of another node",
        "fedlearn/deploy/coordinator_side/admission.py",
        "        if client in owners:\n",
        "        if False:\n",
        "tests/deploy/coordinator_side/test_admission.py",
    ),
    fault(
        "coordinator: a client reports any number of examples",
        "fedlearn/deploy/coordinator_side/admission.py",
        "            if count > binding.max_examples:\n",
        "            if False:\n",
        "tests/deploy/coordinator_side/test_admission.py",
    ),
    fault(
        "coordinator: a response of another node is accepted",
        "fedlearn/protocol/grid_client.py",
        "            elif sender != sent.node_id and not message.has_error():\n",
        "            elif False:\n",
        "tests/engines/test_deployed.py",
        "tests/protocol/test_grid_client.py",
    ),
    fault(
        "protocol: a response to another request is accepted",
        "fedlearn/protocol/messages.py",
        '        for name in ("kind", "run", "round", "id", "layout"):\n            ',
        "        for name in ():\n            ",
        "tests/protocol/test_messages.py::test_a_response_to_another_request_is_refused",
    ),
    fault(
        "settings: only the outermost target is checked",
        BUILDERS,
        "    for path, node in targets:\n        name = ",
        "    for path, node in targets[:1]:\n        name = ",
        REGISTRY + "test_a_configuration_names_no_other_function_of_the_library_at_any_depth",
        also=(
            Change(BUILDERS, "if not callable(target) or not (is_known or is_in_modules(home, allow)):", "if False:"),
        ),
    ),
    fault(
        "settings: each function of the library is a builder",
        BUILDERS,
        "    return is_option or name in STRATEGY_PARTS",
        '    return name.startswith("fedlearn.") or is_option or name in STRATEGY_PARTS',
        REGISTRY + "test_of_all_names_in_the_library_only_registered_builders_and_parts_are_accepted",
    ),
    fault(
        "settings: a value is resolved a second time",
        BUILDERS,
        "    _refuse_interpolations(plain, setting)\n",
        "",
        REGISTRY + "test_no_value_is_resolved_a_second_time",
    ),
    fault(
        "settings: a shared file brings its own consent",
        CONSENT,
        "    for module in modules:\n        if not (module in allowed_by_environment()",
        "    for module in []:\n        if not (module in allowed_by_environment()",
        CONSENTS + "test_a_shared_recipe_brings_no_consent",
    ),
    fault(
        "settings: a shared file names callbacks of Hydra",
        CONSENT,
        '        is_code = key == "()" or',
        "        is_code = False and",
        CONSENTS + "test_a_shared_recipe_brings_no_consent",
    ),
    fault(
        "order: keys with a meaning in Hydra are accepted",
        PLAIN,
        "    if isinstance(node, _Key) and SPECIAL_KEY.fullmatch(text):",
        "    if False:",
        REGISTRY + "test_every_parameter_of_an_order_accepts_plain_values_or_a_named_part",
    ),
    fault(
        "order: interpolations are accepted",
        PLAIN,
        " if INTERPOLATION in text else None",
        " if False else None",
        HOSTILE + "test_no_request_with_code_reaches_a_builder_and_none_tells_a_secret",
    ),
    fault(
        "order: types are not checked",
        PLAIN,
        "    if not _has_type(value, hint):",
        "    if False:",
        ORDERS + "test_builders_of_the_operator_have_names_and_bounds",
    ),
    fault(
        "order: depth is not bounded",
        PLAIN,
        "_problem(node) if depth <= MAX_DEPTH else f",
        "_problem(node) if True else f",
        HOSTILE + "test_a_large_or_deep_order_is_refused_in_bounded_time",
        also=(Change(PLAIN, "        if depth > MAX_DEPTH:\n            continue\n", ""),),
    ),
    fault(
        "order: paths of the operator are settings",
        "fedlearn/runner/registry.py",
        "            if key not in hints or (key in OPERATOR_SETTINGS and not is_named):",
        "            if key not in hints:",
        ORDERS + "test_a_hostile_coordinator_is_refused",
    ),
    fault(
        "order: numbers have no default bounds",
        BOUNDS,
        "        if type(value) in (int, float) and key not in bounded:",
        "        if False:",
        ORDERS + "test_a_hostile_coordinator_is_refused",
    ),
    fault(
        "order: local training has no default bounds",
        BOUNDS,
        '    require_within(local, unbounded, "local")\n',
        "",
        ORDERS + "test_local_training_has_default_bounds",
    ),
    fault(
        "order: a strategy inside another needs no consent",
        "fedlearn/deploy/node_side/order_settings.py",
        '            self._strategy(chosen["rule"], f"{setting}.rule")\n',
        "            pass\n",
        ORDERS + "test_a_strategy_inside_a_strategy_needs_the_consent_of_the_node_too",
    ),
    fault(
        "order: the node calibrates noise",
        "fedlearn/deploy/node_side/order_settings.py",
        '            _require_calibrated(resolved["privacy"])\n',
        "",
        ORDERS + "test_a_node_calibrates_nothing_and_bounds_the_population",
    ),
    fault(
        "submission: another engine than grid",
        SUBMITTED,
        '    _require_grid(settings["engine"])\n',
        "",
        SUBMISSIONS + "test_an_attack_is_refused_before_anything_is_built",
    ),
    fault(
        "submission: callbacks write outside the run folder",
        SUBMITTED,
        "    _require_paths_inside(settings.get(CALLBACKS) or {})\n",
        "",
        SUBMISSIONS + "test_a_callback_of_the_operator_writes_into_the_run_folder_only",
    ),
    fault(
        "submission: a word is built before it becomes a name",
        "fedlearn/deploy/submit.py",
        "    named = name_settings(registry, ",
        "    build_plan(job.cfg)\n    named = name_settings(registry, ",
        SUBMISSIONS + "test_a_submitted_word_runs_nothing_at_the_submitter",
    ),
    # local steps of strategies
    fault(
        "local steps: averaged optimizer states leave under a mechanism without noise for them",
        "fedlearn/loop/optimizer_averaging.py",
        'is_safe = not rule.averages_optimizer or kind in ("none", "example")',
        "is_safe = True",
        AVERAGING + "test_averaged_states_are_refused_where_they_would_leave_without_noise",
    ),
    fault(
        "local steps: a rule takes several gradients per step of DP-SGD",
        "fedlearn/privacy/mechanisms/dp_sgd.py",
        "refuse_if(strategy.local.gradient is not None, reason",
        "refuse_if(False, reason",
        LOCAL_STEPS + "test_noise_on_gradients_of_examples_is_refused_by_name",
    ),
    fault(
        "local steps: rows of padding enter the statistics of a batch",
        "fedlearn/algorithm/batch.py",
        "return xp.where(mask, values, xp.zeros_like(values))",
        "return values",
        LOCAL_STEPS + "test_clients_train_equally_in_turn_and_together",
    ),
    fault(
        "local steps: a trainer ignores a function of a rule",
        "fedlearn/loop/rule_support.py",
        "require(name in supported, ",
        "require(True, ",
        LOCAL_STEPS + "test_a_solver_of_its_own_is_no_plain_training_in_silence",
    ),
    # DP-SGD in JAX and NumPy
    fault(
        "DP-SGD in JAX: gradients that are not finite count",
        JAX + "dp_sgd.py",
        "counts_B = real_B & jnp.isfinite(norm_B)",
        "counts_B = real_B",
        "tests/trainers/test_example_dp.py::test_an_example_of_any_value_moves_a_step_by_no_more_than_the_clip",
    ),
    fault(
        "DP-SGD in JAX: random numbers follow the place in the batch",
        JAX + "dp_sgd.py",
        "example_keys(key, x_B, y_B)",
        "jax.random.split(key, len(y_B))",
        JAX_STEPS + "test_one_example_moves_a_model_with_random_numbers_by_no_more_than_the_clip",
    ),
    fault(
        "DP-SGD in JAX: masks of real clients follow from the seed",
        JAX + "trainer.py",
        "is_secret = request.deployed and request.local.example_dp is not None",
        "is_secret = False",
        JAX_STEPS + "test_real_clients_draw_masks_from_secret_entropy",
    ),
    fault(
        "DP-SGD in JAX: secret noise has no grid",
        JAX + "noise.py",
        "round_to_grid(leaf, std).astype(np.float32)",
        "leaf.astype(np.float32)",
        JAX_STEPS + "test_releases_lie_on_a_grid_with_and_without_an_example",
    ),
    fault(
        "DP-SGD in JAX: float32 loses a norm",
        JAX + "layer_gradients.py",
        "ROUNDING = 2**10 * ",
        "ROUNDING = 0 * ",
        JAX_STEPS + "test_gradients_that_cancel_are_clipped_although_float32_loses_their_norm",
    ),
    fault(
        "DP-SGD in JAX: a proof accepts a sort of the batch",
        JAX + "batch_axes.py",
        "if not moved or axis in np.ravel(moved):",
        "if not moved:",
        JAX_STEPS + "test_a_proof_fails_for_operations_that_mix_examples",
    ),
    fault(
        "DP-SGD in NumPy: noise has no grid",
        "fedlearn/trainers/numpy_steps.py",
        "round_to_grid(sum_D + std * normals(grad_ND.shape[1]), std)",
        "(sum_D + std * normals(grad_ND.shape[1]))",
        "tests/trainers/test_base_trainer.py::test_releases_of_dp_sgd_lie_on_a_grid_with_and_without_an_example",
    ),
    # sites of a run
    fault(
        "sites: a run asks each connected node",
        "fedlearn/protocol/exchange.py",
        "for node_id in self.grid_client.node_ids() if self.sites.includes(node_id)}",
        "for node_id in self.grid_client.node_ids()}",
        SITES + "test_nodes_that_are_not_named_do_not_change_the_model",
    ),
    fault(
        "sites: a site that is not named has the name of its key",
        "fedlearn/protocol/sites.py",
        "return site is not None and (self.names is None or site in self.names)",
        "return self.names is None or site is None or site in self.names",
        SITES + "test_a_node_without_a_name_is_a_stranger",
        "tests/deploy/coordinator_side/test_run_sites.py::test_a_run_asks_its_named_sites_and_needs_all_of_them",
    ),
    fault(
        "sites: a resumed run asks nodes that were admitted later",
        RUN_SITES,
        "names = stored.names if stored else choose_sites(",
        "names = choose_sites(",
        CHOICES + "test_a_resumed_run_asks_only_the_sites_of_its_start",
    ),
    fault(
        "studies: a run asks sites outside its study",
        RUN_SITES,
        "set(admitted) if study is None else set(admitted) & set(study.sites)",
        "set(admitted)",
        CHOICES + "test_a_site_outside_the_study_is_refused_as_an_unknown_one",
        CHOICES + "test_a_run_of_a_study_asks_only_the_sites_of_the_study",
    ),
    fault(
        "studies: each person may submit",
        "fedlearn/deploy/coordinator_side/studies.py",
        "return self.submitters is None or (bool(person) and person in self.submitters)",
        "return True",
        CHOICES + "test_only_a_named_submitter_may_submit",
    ),
    fault(
        "sites: a name may be a path",
        "fedlearn/protocol/sites.py",
        "isinstance(name, str) and SITE_NAME.fullmatch(name) is not None",
        "isinstance(name, str)",
        "tests/runner/test_site_settings.py::test_a_malformed_name_is_refused_with_the_form",
    ),
)
