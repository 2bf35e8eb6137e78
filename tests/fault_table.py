"""The faults that tests/planted_faults.py plants: signs, factors, detached tensors, modes, seeds, intervals, checksums,
keys, retries. `old` is in its file exactly once (tests/test_fault_table.py), and `tests` are the nearest ones."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A text of a file, what replaces it, and arguments of pytest: tests of which one must fail then."""

    file: str
    old: str
    new: str
    tests: str


PGD, SHARDS = "tests/attacks/test_pgd.py", "tests/jobs/test_resume_evaluation.py"
STATS, THREAT, CLASSIFIER = "tests/core/test_stats.py", "tests/core/test_threat.py", "tests/core/test_classifier.py"
CLASSIC, TRAINING = "tests/defenses/test_classic.py", "tests/training/test_training.py"
RESUME, STORE = "tests/training/test_resume_training.py", "tests/records/test_store.py"
BOARD, PLAN, IMAGES = "tests/tables/test_leaderboard.py", "tests/planning/test_plan.py", "tests/data/test_images.py"
FAST = "tests/attacks/test_autoattack_fast.py"
PARTS, VERDICTS = "tests/soundness/test_parts.py", "tests/soundness/test_verdicts.py"

# ruff: noqa: E501
# fmt: off
FAULTS = tuple(Fault(*each) for each in (
    # attacks
    ("attacks/pgd.py", "point + step_size * self._direction", "point - step_size * self._direction", f"{PGD}::test_fgsm_is_exact_on_a_linear_model {PGD}::test_pgd_fails_just_below_the_margin_and_succeeds_just_above"),
    ("attacks/pgd.py", "(point <= 0) & (grad < 0)", "(point <= 0) & (grad > 0)", f"{PGD}::test_l1_steps_pass_over_pixels_that_cannot_move"),
    ("attacks/pgd.py", "grads[0] if draws == 1 else", "grads[0] if draws else", f"{PGD}::test_eot_climbs_the_mean_gradient_of_fresh_draws"),
    ("attacks/fgsm.py", "rel_step_size=1.0", "rel_step_size=0.5", f"{PGD}::test_fgsm_is_exact_on_a_linear_model"),
    ("attacks/eot.py", 'better = hit > state["hit"]', 'better = hit >= state["hit"]', "tests/attacks/test_eot.py::test_the_image_most_often_wrong_is_kept_and_s_stops_growing_when_it_no_longer_pays"),
    ("attacks/certify.py", 'seed(ctx.seed, "certify")', 'seed("certify")', "tests/contract/test_plugins.py::test_a_random_attack_draws_by_the_seed_of_its_block"),
    ("attacks/curve.py", "x_adv[todo] if warm else None", "None", "tests/attacks/test_curve.py::test_the_strongest_point_of_a_budget_is_a_start_at_the_next"),
    ("attacks/transfer.py", "better = wrong > most", "better = wrong >= most", "tests/attacks/test_transfer.py::test_the_first_image_that_breaks_is_kept_and_named"),
    ("attacks/autoattack.py", "stage[rows[broken]] = number", "stage[rows[broken]] = number - 1", "tests/attacks/test_autoattack.py::test_the_cascade_is_the_packages_own"),
    ("attacks/autoattack.py", "(stage < 0) | (stage >= number)", "(stage < 0)", f"{SHARDS}::test_a_kill_at_any_save_changes_no_bit"),
    ("attacks/square.py", "seed=ctx.seed % 2**31", "seed=0", "tests/contract/test_plugins.py::test_a_random_attack_draws_by_the_seed_of_its_block"),
    ("attacks/corruption.py", "range(ctx.first, ctx.first + len(x))", "range(len(x))", "tests/attacks/test_corruption.py::test_blocks_shards_and_kills_change_nothing"),
    ("attacks/_corruptions.py", "wibble / decay**2", "wibble / decay", "tests/attacks/test_corruption.py::test_plasma_is_diamond_square"),
    # the core
    ("bench/core/weights.py", "(shift.norm() + 1e-20)).clamp_max(1.0)", "(shift.norm() + 1e-20))", "tests/attacks/test_flatness.py::test_steps_uphill_and_the_ball_are_relative_to_each_weight"),
    ("bench/core/threat.py", "(self.radius / size).clamp_max(1.0)", "(self.radius / size)", f"{THREAT}::test_projection_lands_in_the_ball_and_stays"),
    ("bench/core/threat.py", "magnitude.cumsum(1) - self.radius", "magnitude.cumsum(1) - 2 * self.radius", f"{THREAT}::test_projection_lands_in_the_ball_and_stays"),
    ("bench/core/epsilon.py", "eps * (1 + ROUNDING) + ROUNDING", "eps * (1 + 1e-2) + ROUNDING", f"{THREAT}::test_check_allows_rounding_and_not_a_thousandth_of_eps"),
    ("bench/core/threat.py", 'p=1 if self.norm == "Linf" else 2', "p=2", f"{THREAT}::test_samples_and_directions"),
    ("bench/core/pgd.py", "(log_p.exp() * (log_p", "(log_p.exp().detach() * (log_p", f"{CLASSIC}::test_kl_equals_the_hand_value_and_both_branches_have_gradient"),
    ("bench/core/pgd.py", "0.001 * torch.randn_like(x)", "0.01 * torch.randn_like(x)", f"{CLASSIC}::test_trades_equals_a_reference_from_the_formula"),
    ("bench/core/pgd.py", "top[:, 0] - top[:, 2]", "top[:, 0] - top[:, 1]", f"{PGD}::test_the_difference_of_logits_ratio_by_hand"),
    ("bench/core/classifier.py", 'net.train(bn_mode != "eval")', 'net.train(bn_mode == "train")', f"{CLASSIFIER}::test_frozen_restores_modes_flags_and_statistics"),
    ("bench/core/classifier.py", ".masked_fill(logits.isnan().any(1), -1)", "", f"{CLASSIFIER}::test_nan_is_a_prediction_of_no_class"),
    ("bench/core/attack.py", "torch.ones_like(clean) if model.stochastic else clean", "torch.ones_like(clean)", f"{CLASSIFIER}::test_clean_errors_are_not_attacked_and_not_robust"),
    ("bench/core/attack.py", 'scope(seed(ctx.seed, "attack"))', 'scope(seed("attack"))', f"{CLASSIFIER}::test_the_draws_of_an_attack_are_those_of_its_seed"),
    ("bench/core/stats.py", "zz / (4 * n * n)", "zz / (2 * n * n)", f"{STATS}::test_wilson_is_scipys"),
    ("bench/core/stats.py", "d1 * d1 - 2 * phi * d1 * d2", "d1 * d1 + 2 * phi * d1 * d2", f"{STATS}::test_newcombes_published_intervals"),
    ("bench/core/stats.py", "2 * float(bdtr(", "float(bdtr(", f"{STATS}::test_mcnemar_is_scipys"),
    ("bench/core/stochastic.py", 'seed(seed_, "single")', 'seed(seed_, "select")', "tests/attacks/test_eot.py::test_draws_of_the_two_kinds_and_of_the_rule_are_independent"),
    ("bench/core/smoothing.py", "position % each >= n0", "position % each > n0", "tests/core/test_smoothing.py::test_counts_are_those_of_a_loop_over_images_and_draws"),
    ("bench/core/smoothing.py", "binom.isf(alpha / 2,", "binom.isf(alpha,", "tests/core/test_smoothing.py::test_the_vote_is_the_two_sided_binomial_test"),
    ("bench/core/rng.py", "np.random.seed(value % 2**32)", "np.random.seed(0)", "tests/core/test_rng.py"),
    ("bench/core/epsilon.py", "_LARGEST_DENOMINATOR = 1020", "_LARGEST_DENOMINATOR = 100", "tests/core/test_numbers.py"),
    ("bench/core/adversarial_training.py", "frozen(net, self.attack_bn_mode)", "frozen(net)", f"{CLASSIC}::test_the_attack_leaves_statistics_and_gradients_as_its_mode_says"),
    # defenses
    ("defenses/trades.py", "kl(clean, net(adv))", "kl(net(adv), clean)", f"{CLASSIC}::test_trades_equals_a_reference_from_the_formula"),
    ("defenses/mart.py", "(kl(clean, moved) * doubt)", "(kl(clean, moved) * doubt.detach())", "tests/defenses/test_mart.py::test_gradient_flows_through_weight_and_both_arguments tests/defenses/test_mart.py::test_loss_equals_the_formula"),
    ("defenses/awp.py", "self._base.threat = self.threat", "pass", "tests/defenses/test_awp.py::test_a_warm_up_of_the_budget_reaches_the_base"),
    ("defenses/free_at.py", "self.threat.project(delta[: len(grad)] + step)", "(delta[: len(grad)] + step)", "tests/defenses/test_free_at.py::test_replays_equal_the_formula"),
    ("defenses/fast_at.py", "accuracy < self._best - self.max_drop", "accuracy < self.max_drop", "tests/defenses/test_fast_at.py::test_the_guard_allows_a_fall_by_less_than_the_largest_one"),
    ("defenses/pni.py", 'list(own.values()), "weight_decay": 0.0', "list(own.values())", "tests/defenses/test_pni.py::test_sizes_are_learnt_without_weight_decay"),
    ("defenses/smoothadv.py", "2 * self.threat.radius / self.steps", "self.threat.radius / self.steps", "tests/defenses/test_smoothadv.py::test_inner_and_loss_equal_a_reference_from_the_formula"),
    ("defenses/rse.py", "for layer in layers[1:]", "for layer in layers", "tests/defenses/test_rse.py::test_sites_are_the_input_and_every_further_convolution"),
    ("defenses/lsa.py", "(gaps / sizes.clamp_min(1e-12)).argmin(1)", "gaps.argmin(1)", "tests/defenses/test_lsa.py::test_input_adversary_equals_a_loop"),
    ("defenses/noisy.py", "self.w_prob * -losses.log_win(", "self.w_prob * losses.log_win(", "tests/defenses/test_noisy.py::test_loss_of_a_linear_net_by_hand"),
    ("defenses/at_mixture.py", "(1 - self.alpha) * ce_adv", "ce_adv", "tests/defenses/test_at_mixture.py::test_loss_equals_the_formula"),
    # closed-form noise
    ("bench/noise/losses.py", "- 2 * row.gather(1, rivals)", "- row.gather(1, rivals)", "tests/noise/test_moments.py::test_competitor_rows_equal_the_full_covariance"),
    ("bench/noise/losses.py", "p * rows - p * (p * rows)", "p * rows + p * (p * rows)", "tests/noise/test_moments.py::test_softmax_trace_is_that_of_the_delta_method"),
    ("bench/noise/layer_moments.py", "apply(x.var, layer, weight.square())", "apply(x.var, layer, weight.abs())", "tests/noise/test_moments.py::test_linear"),
    # training
    ("bench/training/averaging.py", "min(self.decay, (1 + n) / (10 + n))", "min(self.decay, n / (10 + n))", "tests/training/test_averaging.py::test_ema_of_three_steps_equals_the_closed_form"),
    ("bench/training/averaging.py", "len(x) / (seen + len(x))", "len(x) / (seen + 1)", "tests/training/test_averaging.py::test_recalibrated_statistics_are_averages_over_batches_weighted_by_size"),
    ("bench/training/optimizer.py", "            self.scaler.unscale_(self.optimizer)\n", "", "tests/training/test_optimizer.py::test_a_step_whose_scaled_gradient_overflows_is_skipped_and_counted"),
    ("bench/training/training_run.py", 'seed(self.seed, "order", epoch)', 'seed(self.seed, "order")', f"{TRAINING}::test_training_equals_a_plain_loop_bit_for_bit"),
    ("bench/training/train.py", 'seed(job.seed, "init", job.model.name)', 'seed("init", job.model.name)', f"{TRAINING}::test_initial_weights_are_those_of_seed_and_architecture"),
    ("bench/training/best_epoch.py", "if accuracy > self.best:", "if accuracy >= self.best:", "tests/training/test_divergence.py::test_the_best_epoch_is_the_first_maximum_and_a_sudden_drop_is_recorded"),
    ("bench/training/divergence.py", "self._constant + 1 if one_class else 0", "self._constant + one_class", "tests/training/test_divergence.py::test_a_net_that_has_not_learned_yet_is_not_stopped"),
    ("bench/training/resume.py", 'torch.set_rng_state(state["torch"])', "pass", f"{RESUME}::test_random_streams_continue"),
    ("bench/training/checkpoint.py", "hashlib.sha256(json.dumps(texts, sort_keys=True).encode())", "hashlib.sha256()", f"{RESUME}::test_checkpoints_that_are_damaged_or_of_other_code_are_ignored"),
    # data
    ("bench/data/images.py", "digest.update(images.y.cpu()", "digest.copy().update(images.y.cpu()", f"{IMAGES}::test_the_hash_covers_pixels_and_labels"),
    ("bench/data/images.py", "torch.randint(0, 2 * pad + 1,", "torch.randint(0, 2 * pad,", f"{IMAGES}::test_augmented_images_are_crops_with_uniform_offsets"),
    # records
    ("bench/records/leases.py", "_facts(pid)[1] == began", "bool(began)", "tests/records/test_leases.py::test_a_process_id_that_came_again_is_another_process"),
    ("bench/atomic.py", "            os.fsync(file.fileno())\n", "", f"{STORE}::test_a_file_is_on_the_disk_before_it_gets_its_name_and_the_name_after"),
    ("bench/records/store.py", "or self.matches(key, SAMPLES, record)", "or self.has(key, SAMPLES)", f"{STORE}::test_samples_come_back_and_damaged_ones_are_refused {STORE}::test_lost_samples_are_noticed_too"),
    ("bench/records/merge.py", "if ours.state != theirs.state", "if False", "tests/records/test_maintenance.py::test_merge_names_conflicts_and_damage_and_copies_nothing"),
    ("bench/records/runtime_estimate.py", "if job.parts or (self.device", "if (self.device", "tests/progress/test_remaining.py::test_assembled_shards_are_not_counted_twice"),
    # planning
    ("bench/planning/job.py", 'if (name, value) != ("split", "test")', 'if name != "split"', f"{PLAN}::test_evaluations_on_validation_images_share_the_training"),
    ("bench/planning/trainings.py", "self.spec.threat.eps[-1]", "self.spec.threat.eps[0]", f"{PLAN}::test_training_takes_the_largest_budget_and_train_eps_replaces_it"),
    ("bench/planning/catalog.py", "field.name not in later or value != field.default", "field.name not in later", "tests/planning/test_catalog.py::test_a_setting_added_later_is_left_out_of_a_job_at_its_default"),
    ("bench/planning/evaluations.py", "if job.model_key != train.key", "if job.model_key", "tests/attacks/test_transfer.py::test_every_row_is_shown_what_was_made_against_every_other_at_its_budget"),
    # jobs and executors
    ("bench/jobs/evaluate.py", "seed(job.seed, name, start) for name", "seed(job.seed, name) for name", f"{SHARDS}::test_each_block_has_draws_of_its_own"),
    ("bench/jobs/retries.py", "AGAIN, HALVINGS = 2, 3", "AGAIN, HALVINGS = 3, 3", "tests/executors/test_schedule.py::test_what_is_tried_again_and_how_often"),
    ("bench/jobs/microbatch.py", "last - first) >> halvings", "last - first) >> 1", "tests/jobs/test_microbatch.py::test_a_block_is_halved_as_often_as_told"),
    ("bench/jobs/columns.py", 'float("nan") if like', "0.0 if like", "tests/jobs/test_shards.py::test_a_shard_without_an_attacked_image_lacks_its_columns_and_fits_all_the_same"),
    ("bench/jobs/evaluation_job.py", "weights_of(store, job), data.test_hash", "None, data.test_hash", "tests/jobs/test_other_weights.py::test_the_origin_of_a_block_names_all_it_depends_on"),
    ("bench/jobs/recheck.py", "threat.check(x, x_adv[start:stop])", "threat.check(x, x)", "tests/jobs/test_recheck.py"),
    ("bench/executors/schedule.py", "max(chains[key], shared[key])", "shared[key]", "tests/executors/test_schedule.py::test_much_work_behind_a_job_counts_as_a_chain_does tests/executors/test_schedule.py::test_the_longest_job_goes_first_and_equal_ones_as_planned tests/executors/test_schedule.py::test_a_short_training_with_long_evaluations_goes_before_a_long_one_without"),
    ("bench/executors/slot_pool.py", "len(device.broke) >= BENCH_AFTER", "len(device.broke) > BENCH_AFTER", "tests/executors/test_devices.py::test_two_different_jobs_without_a_success_between_them_bench_a_device"),
    ("bench/executors/slot_pool.py", "        device.alone = False\n", "", "tests/executors/test_devices.py::test_a_device_is_shared_again_after_a_job_that_was_alone"),
    # results and tables
    ("bench/results/worst_case.py", "np.argmin(np.stack(choosing)", "np.argmax(np.stack(choosing)", f"{BOARD}::test_against_noise_the_attack_is_chosen_by_some_draws_and_judged_by_others"),
    ("bench/results/significance.py", "found.significant and found.difference > 0", "found.significant", "tests/results/test_significance.py::test_only_the_higher_of_two_rows_is_better"),
    ("bench/results/seed_values.py", "round(self.mean * self.n), self.n, self.unjudged", "round(self.mean * self.n) * len(self.values), self.n * len(self.values), self.unjudged", f"{BOARD}::test_seeds_are_kept_apart_and_their_mean_has_the_interval_of_one"),
    ("bench/results/certificates.py", "(reach >= radius)", "(reach > radius)", f"{BOARD}::test_certified_accuracy_at_radii_of_ones_own"),
    ("bench/results/per_image.py", "int(in_place.argmin())", "len(in_place)", f"{BOARD}::test_a_prefix_ends_at_the_first_gap_and_the_order_in_the_file_does_not_matter"),
    ("bench/tables/pareto.py", "if y > best or (x, y) == (at, best)", "if y >= best", "tests/tables/test_pareto.py::test_the_front_is_what_nothing_beats"),
    ("bench/tables/ranking.py", '"UNSOUND": 3,', '"UNSOUND": 0,', f"{VERDICTS}::test_unsound_and_invalid_rows_are_last_and_have_no_rank"),
    # soundness
    ("bench/soundness/checks.py", "sign * (compared - limit) > ROUNDING", "(compared - limit) > ROUNDING", f"{PARTS}::test_value_and_limits_give_the_level"),
    ("bench/soundness/forward_checks.py", "(z.sum(1) - 1).abs() <= SOFTMAX_SUM", "z.sum(1).abs() <= SOFTMAX_SUM", f"{PARTS}::test_outputs_of_softmax_are_told_from_logits"),
    ("bench/soundness/gradient_checks.py", "(grad == 0).flatten(1).all(1)", "(grad == 0).flatten(1).any(1)", f"{PARTS}::test_a_gradient_is_zero_only_where_every_pixel_is"),
    ("bench/soundness/attack_strength.py", "torch.zeros_like(run.correct)) & run.correct", "torch.zeros_like(run.correct)) & ~run.correct", f"{PARTS}::test_a_lost_adversarial_point_counts_for_the_set_if_no_attack_returned_one"),
    ("bench/soundness/symptoms.py", "column.correct & (radius >= e.row.eps_value)", "column.correct", f"{VERDICTS}::test_a_certificate_counts_up_to_its_own_radius"),
    # the fast AutoAttack
    ("attacks/_apgd.py", "self.size / 2, self.size", "self.size / 3, self.size", f"{FAST}::test_apgd_takes_the_steps_of_the_package"),
    ("attacks/_apgd.py", "alpha=2 * self.momentum", "alpha=self.momentum", f"{FAST}::test_apgd_takes_the_steps_of_the_package"),
    ("attacks/_apgd.py", "(self.rises <= RISING * interval) | stuck", "(self.rises < RISING * interval) | stuck", f"{FAST}::test_the_step_is_halved_where_the_loss_rose_in_at_most_three_of_four_steps"),
    ("attacks/_apgd.py", "self.point = torch.where(where, self.best, self.point)", "pass", f"{FAST}::test_apgd_takes_the_steps_of_the_package"),
    ("attacks/_apgd.py", "(top[:, 2] + top[:, 3])", "(top[:, 1] + top[:, 3])", f"{FAST}::test_the_loss_of_apgd_is_the_packages"),
    ("attacks/_apgd.py", "keep &= self.best_loss >= floor", "keep &= self.loss >= floor", f"{FAST}::test_a_row_leaves_by_its_best_loss_and_not_by_the_last"),
    ("attacks/_fab.py", "wrong * (BACK - 1)", "wrong * (1 - BACK)", f"{FAST}::test_fab_comes_as_near_as_the_package"),
    ("attacks/_fab.py", "(size / (size + size_center))", "(size_center / (size + size_center))", f"{FAST}::test_a_step_of_fab_mixes_both_projections_by_their_sizes"),
    ("attacks/_fab.py", "torch.where(towards > 0, 1 - point, point)", "torch.ones_like(point)", f"{FAST}::test_the_step_to_a_plane_is_the_smallest"),
    ("attacks/_square.py", "sum(query > bound", "sum(query >= bound", f"{FAST}::test_squares_have_the_sides_and_places_of_the_package"),
    ("attacks/_square.py", "self.up[rows, queries][:, :, None, None], high", "~self.up[rows, queries][:, :, None, None], high", f"{FAST}::test_square_accepts_what_one_square_at_a_time_accepts"),
    ("attacks/_square.py", "(margins < self.least[active][:, None])", "(margins <= self.least[active][:, None])", f"{FAST}::test_square_accepts_what_one_square_at_a_time_accepts"),
    ("attacks/_square.py", "~(found > 0))  # NaN", "found < 0)  # NaN", f"{FAST}::test_an_answer_of_nan_is_an_error_of_the_model"),
    ("attacks/_rows.py", "inside &= predicted(self.model(points)) != self.y[images]", "pass", f"{FAST}::test_every_hit_is_verified_by_the_model_itself"),
    ("attacks/_rows.py", "seed(key, image, rank)", "seed(key, rank)", f"{FAST}::test_streams_are_keyed_by_image_and_target"),
    ("attacks/_rows.py", "logits.argsort(dim=1, descending=True)", "logits.argsort(dim=1)", f"{FAST}::test_the_most_likely_targets_come_first"),
    ("attacks/_rows.py", "torch.maximum(rows[..., ::2], rows[..., 1::2])", "torch.maximum(rows[..., ::2], rows[..., ::2])", f"{FAST}::test_pooling_by_slices_gives_the_same_numbers"),
    ("attacks/autoattack_fast.py", "run.masked or not bool(", "not bool(", f"{FAST}::test_masked_gradients_are_judged_in_full"),
    ("attacks/autoattack_fast.py", "if quick and not self.masked else", "if quick else", f"{FAST}::test_masked_gradients_are_judged_in_full"),
    ("attacks/autoattack_fast.py", 'seed(self.ctx.seed, "audit")', 'seed("audit")', f"{FAST}::test_an_audit_judges_random_survivors_of_the_screen"),
    ("attacks/autoattack_fast.py", "& ~audited & ~proved", "& ~audited", "tests/attacks/test_proofs.py::test_outcomes_are_those_of_the_whole_suite"),
    ("attacks/_proofs.py", "y[part], threat, method) > 0", "y[part], threat, method) > -1", "tests/attacks/test_proofs.py"),
    ("bench/core/stats.py", "max(low - unjudged, 0.0)", "max(low, 0.0)", f"{STATS}"),
    # newer defenses
    ("defenses/dual_margin.py", "logits - self.fall(gradient, adv)[:, None] * onehot", "logits + self.fall(gradient, adv)[:, None] * onehot", "tests/defenses/test_dual_margin.py::test_the_loss_equals_the_formula"),
    ("defenses/dual_margin.py", "torch.where(gradient > 0, u, 1 - u)", "torch.where(gradient < 0, u, 1 - u)", "tests/defenses/test_dual_margin.py::test_the_fall_of_a_linear_net_is_the_largest_in_ball_and_box"),
    ("defenses/gradalign.py", "create_graph=True", "create_graph=False", "tests/defenses/test_gradalign.py::test_the_gradient_of_the_penalty_by_differences"),
    ("defenses/_guided.py", "self._attacks % 2 == 1", "self._attacks % 2 == 0", "tests/defenses/test_guided.py::test_images_and_loss_equal_the_formula tests/defenses/test_guided.py::test_the_distance_guides_the_attack_where_it_has_weight"),
    ("defenses/gat.py", "progress >= self.late_from", "progress > 1 - self.late_from", "tests/defenses/test_guided.py::test_weights_follow_the_papers"),
    ("defenses/_certified.py", "1 - share * (1 - self.kappa)", "1 - (1 - self.kappa)", "tests/defenses/test_certified.py::test_loss_equals_the_formula"),
    ("defenses/crown_ibp.py", "(1 - share) * margins", "share * margins", "tests/defenses/test_certified.py::test_loss_equals_the_formula"),
    ("defenses/fgsm_pgi.py", "start.detach() + self.threat.radius", "start.detach() - self.threat.radius", "tests/defenses/test_fgsm_pgi.py::test_epochs_equal_the_formula"),
    # what a model of one's own and a gate meet
    ("bench/commands/gate.py", "found.values and found.mean >= least", "found.mean >= least - 0.05", "tests/commands/test_gate.py::test_a_limit_is_met_by_its_own_value_and_missed_by_a_little_less"),
    ("bench/soundness/memorization.py", "here[test.clean], there[trained.clean]", "there[trained.clean], here[test.clean]", "tests/soundness/test_memorization.py::test_a_memory_is_disclosed_by_images_that_it_cannot_hold"),
    ("bench/soundness/test_time_optimization.py", "audit.model.predict(x[:1])", "audit.model.predict(x)", f"{PARTS}::test_no_check_gives_the_model_an_empty_batch"),
    ("bench/data/images.py", "held_out[_permutation(len(held_out), \"validation order\", seed)]", "held_out", f"{IMAGES}::test_the_first_validation_images_of_a_folder_are_of_all_classes"),
    ("bench/results/labels.py", "worst.values and lowest < worst.mean", "worst.values and lowest <= worst.mean", f"{BOARD}::test_a_worst_case_below_all_attacks_needs_no_note"),
))
# fmt: on
