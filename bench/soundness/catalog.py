"""The catalog of soundness checks, for audits, records, tables and `bench explain`: the one place of every limit."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from bench.soundness.checks import Check

# Parameters of the measurements, which the texts below state
PASSES = 5  # C1: over the same batch
IN_BATCH = 1e-3  # C1: limit of the logit gap between batches, where sums have another order
SOFTMAX_SUM = 1e-5  # C2
LAYER_RUNS = 3  # C6
BUDGET_FACTORS = ("1/8", "1/4", "1/2", "1", "2", "4")  # C8: of the largest budget, for 8/255 1 to 32 over 255
LAST_STEPS, STILL_RISING = 10, 0.05  # C10: share of the loss's range, and limit of the share of images
DRAWS = {"quick": 1_000, "full": 10_000}  # C12
LOWER_THAN_CLAIMED, BETTER_SCALE = 0.01, 0.1  # C18
HALF_GRAY_LEVEL = "1/510"  # C18
MOVES, MOVE_SIZE = 100, 0.05  # C29: the size as a share of eps
JUDGED = {"quick": 200, "full": 1_000}  # C30: images of each kind
SHIFT, TURN = 1 / 28, 5.0  # C30: share of the side, one pixel of MNIST; degrees
MOVED_BUDGET, LOST_ACCURACY = Fraction(1, 2), 0.3  # C30: share of eps; limit for clean accuracy
WITHSTANDS_ONE_STEP = 0.8  # C26: share of clean accuracy
FLOOR_STEPS, FLOOR_RESTARTS = 50, 5  # C24
_DIFFERENCE = "; by the lower end of the 95 % interval of the difference"  # Check.difference
_PAIRED = _DIFFERENCE.replace("difference", "paired difference")

_CHECKS = {
    "C1": Check(
        "The model is deterministic",
        {"U": 1e-4},
        f"{PASSES} passes over the same batch, then the first images alone and in another order: changed labels, and "
        "the largest distance of logits divided by their L2 norm",
        f"no label, at most {{U}} (AutoAttack's value; {IN_BATCH:g} between batches); a declared stochastic model: I",
        "Evaluated by one noisy pass, an attack counts chance as success and noise as defense. BatchNorm in train "
        "mode gives another model for each batch size, and dropout left on is undeclared noise (AutoAttack's flags; "
        "Athalye et al. 2018, arXiv 1802.00420).",
        "Put the model in eval mode and let BatchNorm use running statistics. If the noise is the defense itself, set "
        "`stochastic = True` on its Classifier: attacks then average gradients over draws, fresh draws evaluate "
        "them, and the row appears in a section of its own.",
    ),
    "C2": Check(
        "The model returns logits",
        {"F": 0},
        "do all rows sum to 1 without a negative value (softmax), or is the logsumexp of all 0 (log-softmax)?",
        f"within {SOFTMAX_SUM:g} on all rows",
        "Losses apply softmax themselves. Applied twice it flattens gradients, and a confident model saturates, so "
        "attacks on cross-entropy stall. AutoAttack's own test misses log-softmax.",
        "Leave out the last softmax or log_softmax of `forward`; predictions do not change.",
    ),
    "C3": Check(
        "All numbers are finite",
        {"X": 0},
        "NaN or Inf in logits, loss, input gradient or adversarial images",
        "none",
        "A comparison with NaN is false, so an attack that meets one stops moving without an error, and its failure "
        "looks like robustness. No number of such a row means anything.",
        "Find the operation that causes it: sqrt or norm at 0, log of 0, division by a zero deviation, overflow in "
        "half precision. Add a small constant there; train again if the weights themselves are not finite.",
    ),
    "C4": Check(
        "Gradients are not zero",
        {"F": 0.01, "U": 0.1},
        "share of correctly classified images whose input gradient is exactly 0, for each loss (ce, cw, dlr)",
        "more than {F:%}: F; more than {U:%} for every loss: U, unless the row has a gradient-free attack",
        "Without a gradient a gradient attack returns its starting point. Rounding, thresholds and saturated outputs "
        "cause this, and hide weakness instead of removing it (gradient masking, Athalye et al. 2018, arXiv "
        "1802.00420; AutoAttack's flags; Pintor et al. 2022, arXiv 2106.09947).",
        "If only ce is zero, the logits are too large: read the results of cw or dlr. Otherwise override `surrogate` "
        "with a differentiable approximation of the rounding step (BPDA), and add `square`.",
    ),
    "C5": Check(
        "The loss is differentiable",
        {"U": 0},
        "one backward pass from the loss to the image: does autograd raise, or find no path?",
        "a path exists",
        "A cut graph (detach, no_grad, argmax, NumPy inside forward) stops every gradient attack, whatever the "
        "model's robustness (Athalye et al. 2018, arXiv 1802.00420). AutoAttack then simply fails.",
        "Remove the cut, or override `surrogate` with a differentiable approximation (BPDA); attacks are still scored "
        "on the model itself.",
    ),
    "C6": Check(
        "No optimization at test time",
        {"U": 0},
        "calls of automatic differentiation inside a forward pass without gradients, and runs of each layer",
        f"0 calls; half of the layers run at most {LAYER_RUNS} times (F where single layers run more often)",
        "The gradient of a model that purifies its input by gradient steps, or adapts itself to it, is not what a "
        "standard attack sees; most such defenses fell to adaptive attacks (Croce et al. 2022, arXiv 2202.13711).",
        "Rank it only with an adaptive attack: through the whole optimization (unrolled or implicit) or BPDA, in "
        "addition to transfer and black-box attacks; and compare at equal inference time.",
    ),
    "C7": Check(
        "Iterative attacks beat one step",
        {"U": 0.01},
        "accuracy under PGD against accuracy under FGSM at the same eps",
        "PGD at most {U:pp} above FGSM; above in the worst case of all PGD losses: U" + _PAIRED,
        "PGD can take the very step of FGSM. Where it does worse its gradients mislead it: the loss surface is "
        "shattered or masked around the image (Carlini et al. 2019, arXiv 1902.06705; Athalye et al. 2018).",
        "Add restarts and steps, the losses cw and dlr, and `square`; look at the loss along the attack's path.",
    ),
    "C8": Check(
        "Accuracy falls as eps grows",
        {"U": 0.01},
        f"accuracy under PGD at 0, {', '.join(BUDGET_FACTORS)} times the largest budget; adversarial images of a "
        "smaller budget that are classified correctly when evaluated again",
        "no rise of more than {U:pp}; no adversarial image is lost" + _PAIRED,
        "A larger ball contains the smaller one, so accuracy in it cannot be higher. Where the measured one rises, "
        "the attack and not the model determines the number (Carlini et al. 2019, arXiv 1902.06705).",
        "Plot accuracy against eps. A rise at small eps means masked gradients there: add losses, restarts and "
        "`square`. A rise at large eps alone mostly means too few or too short steps.",
    ),
    "C9": Check(
        "An unbounded attack succeeds",
        {"F": 0.01, "U": 0.1},
        "accuracy under PGD in a ball that holds every image: eps 1 for Linf, sqrt(pixels) for L2, pixels for L1",
        "more than {F:%}: F, more than {U:%}: U",
        "With any image allowed, an image of another class is in reach, so the true accuracy is 0. What is left is "
        "the attack's failure, at every smaller eps too (Carlini et al. 2019, arXiv 1902.06705).",
        "Repair the attack before reading any number: other losses, a surrogate for the step that stops gradients, "
        "`square`. A model that predicts one class for every image fails here too: look at its clean accuracy.",
    ),
    "C10": Check(
        "The attack has converged",
        {"F": 0.005},
        "PGD with twice the steps and with twice the restarts; share of robust images whose best loss gained more "
        f"than {100 * STILL_RISING:g} % of its range in the last {LAST_STEPS} steps",
        f"at most {{F:pp}} lower each; at most {100 * STILL_RISING:g} % of the robust images{_PAIRED}",
        "Where twice the effort succeeds on more images, the printed accuracy is that of an attack stopped half-way "
        "(Carlini et al. 2019, arXiv 1902.06705; incomplete optimization in Pintor et al. 2022, arXiv 2106.09947).",
        "Raise steps and restarts until accuracy no longer changes, or rank by AutoAttack.",
    ),
    "C11": Check(
        "No adversarial image is lost",
        {"F": 0},
        "images misclassified at a point on the attack's path, and not at the point that it returned",
        "none",
        "An attack that returns its last iterate forgets successes (silent success, Pintor et al. 2022, arXiv "
        "2106.09947). Our PGD returns the best point, so a count above 0 means that the model whose gradient the "
        "attack follows and the deployed model disagree.",
        "Compare `surrogate()` with the deployed prediction, and see C1 for a model that changes between passes.",
    ),
    "C12": Check(
        "Gradients beat random noise",
        {"U": 0.01},
        f"gradient attacks against the best of {DRAWS['quick']} random draws from the ball ({DRAWS['full']} with "
        "--checks full)",
        "noise at most {U:pp} lower" + _PAIRED,
        "Random search is the weakest attack there is. Where it succeeds more often, gradients mislead (Carlini et "
        "al. 2019, arXiv 1902.06705; Athalye et al. 2018, arXiv 1802.00420).",
        "Disregard every gradient attack on this model; use `square`, transfer and a surrogate.",
    ),
    "C13": Check(
        "Gradients beat black-box attacks",
        {"F": 0.002, "U": 0.02},
        "how much Square, which sees scores only, lowers the worst case of the white-box attacks",
        "more than {F:pp} (AutoAttack's value): F; more than {U:pp}: U" + _PAIRED,
        "An attack that may read gradients can do all that a black-box attack can. Where the latter succeeds more "
        "often, gradients are masked (AutoAttack's flags; Carlini et al. 2019, arXiv 1902.06705).",
        "Look at C4, C9 and C19 for the cause; provide a surrogate and attack again. The worst case includes Square "
        "anyway.",
        source="records",
    ),
    "C14": Check(
        "Gradients beat transfer attacks",
        {"F": 0.005},
        "how much images of the undefended baseline and of every other defense lower the white-box worst case",
        "more than {F:pp}" + _PAIRED,
        "Images made on another model do not use this one. Where they succeed more often than attacks with its own "
        "gradients, those gradients mislead (Athalye et al. 2018, arXiv 1802.00420).",
        "Add `transfer` to the attacks: its images join the worst case. Then look for the cause with C4 and C19.",
        source="records",
    ),
    "C15": Check(
        "Losses agree",
        {"F": 0.05},
        "difference between the accuracies under cross-entropy and under a margin loss (cw or dlr), same attack",
        "at most {F:pp}" + _PAIRED,
        "Cross-entropy saturates for large logits and the margin does not; a difference means that one of the two "
        "attacks is stuck (Croce and Hein 2020, arXiv 2003.01690).",
        "Report the worst case of both; scale logits down, or rank by AutoAttack, which uses several losses.",
        source="records",
    ),
    "C16": Check(
        "Stored images are in the ball",
        {"X": 0},
        "the stored adversarial images, measured again in a separate process and in float64: norm, pixel range, "
        "shape, labels, and the accuracy computed from them; where the images are not kept, as in a clone, the norms "
        "that were measured in float64 and stored when they were made",
        "norm at most eps + 1e-6, inside [0,1], every image; equal accuracy",
        "An image outside ball or box is no adversarial example, and one clipped afterwards is not the image that was "
        "scored. A number that cannot be reproduced is no result (DEEPSEC, its issues).",
        "Run the evaluation again (delete its folder under results/); if it fails again, report the attack.",
        source="images",
    ),
    "C17": Check(
        "An attack leaves the model unchanged",
        {"X": 0},
        "accuracy at eps 0 against clean accuracy; weights, buffers, modes and gradients before and after attacks",
        "equal, bit for bit",
        "An attack that changes what it attacks (a library that leaves layers in train mode, a model that counts or "
        "learns in forward) makes every later number that of another model (torchattacks, issues 21 and 124).",
        "Find what `forward` writes to: buffers, modes of its own layers, gradients left on parameters.",
    ),
    "C18": Check(
        "The model takes images in [0,1]",
        {"F": 0, "X": LOWER_THAN_CLAIMED},
        "accuracy on raw images in [0,1] against the claimed one, and against the same images in other scales (0 to "
        "255, -1 to 1, mean 0 and deviation 1)",
        f"{{X:pp}} below the claim, beyond the 99.9 % interval: X; another scale better by more than "
        f"{100 * BETTER_SCALE:g} pp and three deviations: X; an Linf budget below half a gray level "
        f"({HALF_GRAY_LEVEL}): F",
        "Budgets are in units of [0,1]. A model that expects another scale is attacked with a budget that is wrong by "
        "the factor (255, or the deviation of the data) and looks weak or robust for no reason.",
        "Make the normalization the first layer of the model, once, and give it images in [0,1]; write eps as 8/255, "
        "not 8.",
    ),
    "C19": Check(
        "The attack passes the binarization test",
        {"U": 0.95},
        "for each image, a two-class head on the model's own features with a known adversarial point inside the ball, "
        "and none among random points; share of images where PGD finds one",
        "at least {U:%}",
        "An attack that misses a point known to exist proves nothing when it finds none elsewhere: of 13 published "
        "evaluations of later broken defenses, 11 fail this test (Zimmermann et al. 2022, arXiv 2206.13991).",
        "Something between image and last layer stops the gradient: provide a surrogate for it, or attack without "
        "gradients. Neither PGD nor APGD shows robustness here.",
        at_least=True,
    ),
    "C20": Check(
        "Published values are reproduced",
        {"X": 0},
        "robust accuracy of models whose value is published, under the standard attack",
        "an undefended CIFAR-10 net at most 1 % at 8/255; two RobustBench models within 0.3 pp on 10 000 images",
        "A harness that does not reproduce published numbers gets others wrong too. The test needs the data and the "
        "weights of the zoo, and concerns the harness, not one row.",
        "Run it where the weights are available; until then the tables say not checked.",
        source="harness",
    ),
    "C21": Check(
        "The worst case is per image",
        {"I": 0},
        "is the headline the minimum over all attacks for each image, clean errors included?",
        "always: no table shows an average over attacks",
        "A model that one attack fools on half of the images and another on the other half has accuracy 0, and an "
        "average of 50 % (Carlini et al. 2019, arXiv 1902.06705; DEEPSEC, its issues).",
        "Nothing: the tables are generated so. Of other tables, ask which one they print.",
        source="harness",
    ),
    "C22": Check(
        "Enough images",
        {"I": 1000},
        "number of images, and the 95 % interval that follows from it",
        "at least {I}, or the whole test set: below, the row is provisional",
        "At 50 % the exact interval is +-10 pp with 100 images, 6.3 with 256, 3.2 with 1 000 and 1.0 with 10 000. "
        "Less may be chance.",
        "Evaluate 1 000 images (`--n 1000`) before comparing, 10 000 before publishing; the paired test decides ties.",
        source="records",
        at_least=True,
    ),
    "C23": Check(
        "Enough seeds",
        {"I": 3},
        "number of training seeds of the row",
        "{I} for any claim of difference; below, the row is marked",
        "Two trainings of one method differ by up to a few points. One seed does not separate chance from method.",
        "Train with `--seeds 0,1,2`; the row then shows mean and standard deviation.",
        source="records",
        at_least=True,
    ),
    "C24": Check(
        "Enough attack steps",
        {"F": float(FLOOR_STEPS * FLOOR_RESTARTS)},
        "gradient steps of each attack on each image, by its settings or as counted",
        f"at least those of PGD with {FLOOR_STEPS} steps and {FLOOR_RESTARTS} restarts, or AutoAttack standard; "
        "below, the row is provisional",
        "A weak attack gives a high number. Accuracy under PGD-10 is compared with accuracy under AutoAttack every "
        "year (Carlini et al. 2019, arXiv 1902.06705; AttackBench, arXiv 2404.19460, compares at equal cost).",
        f"Add `autoattack`, or PGD with steps={FLOOR_STEPS} restarts={FLOOR_RESTARTS}.",
        source="records",
        at_least=True,
    ),
    "C25": Check(
        "Certificates hold",
        {"X": 0},
        "certified accuracy at a radius against accuracy under attack with that budget in the same norm; image by "
        "image where a proof is without chance (`interval`)",
        "certified not above attacked, beyond the intervals of both; no image with a proof is broken",
        "A certificate states that no attack of that size succeeds. One that does proves an error: in the "
        "certificate, in its radius, or in the norm (Cohen et al. 2019, arXiv 1902.02918).",
        "Check the units of the radius (L2, [0,1]), that noise is added before normalization, and that the draws "
        "which count the class are not those which chose it; for `interval`, the bounds of each layer.",
        source="records",
    ),
    "C26": Check(
        "No catastrophic overfitting",
        {"F": 0.2},
        f"accuracy under one-step attacks, where it is at least {100 * WITHSTANDS_ONE_STEP:g} % of clean accuracy, "
        "minus accuracy under iterative ones; validation accuracy under PGD during training",
        "a difference or a sudden fall of more than {F:pp}" + _PAIRED,
        "One-step adversarial training can learn to fool the one step: accuracy near 100 % under FGSM, 0 % under PGD "
        "(Wong et al. 2020, arXiv 2001.03994; Andriushchenko and Flammarion 2020, arXiv 2007.02617).",
        "Take the checkpoint that validation chose, train with more steps, a smaller step or a regularizer.",
        source="records",
    ),
    "C27": Check(
        "No model selection on the test set",
        {"U": 0},
        "were checkpoint and attack settings chosen on a validation split, whose hash is stored?",
        "a chosen checkpoint names the split that chose it, and it shares no image with the test set",
        "The accuracy of a checkpoint chosen by test accuracy is optimistic: the best epoch on the test set lies "
        "above the last one by whole points (Rice et al. 2020, arXiv 2002.11569).",
        "Set `validation` in the data section and read the row of `best`; or report `last`.",
        source="records",
    ),
    "C28": Check(
        "An adaptive attack exists",
        {"F": 0},
        "does the defense name an attack designed for it, or the reason why a standard one is adaptive?",
        "yes, or argued; missing: F",
        "Standard attacks broke few of the defenses that fell; attacks designed for the defense broke them all "
        "(Tramer et al. 2020, arXiv 2002.08347).",
        "Write an attack that uses the mechanism (a surrogate, EOT, the defense's own loss), or state in its file why "
        "plain gradients see it all.",
        source="records",
    ),
    "C29": Check(
        "The loss is smooth at small scale",
        {"F": 0.1},
        f"mean relative change of the margin under {MOVES} random moves of {MOVE_SIZE:g} eps from the images",
        "at most {F}",
        "Where a tiny random move changes the loss much, one gradient says little about the next step, and attacks "
        "wander (unstable predictions, Pintor et al. 2022, arXiv 2106.09947; shattered gradients, arXiv 1802.00420).",
        "Average the gradient over random moves (EOT over the input), or add `square`; best is a surrogate without "
        "the rough layer.",
    ),
    "C30": Check(
        "Robust beyond the test images",
        {"U": 0.1},
        "an imported model on training images and on moved test images (shifted by 1/28 of the side, turned by up to "
        f"{TURN:g} degrees): accuracy, and the share of the correctly classified that withstand a short PGD, on moved "
        "images at half the budget, against those of test images",
        f"robust shares at most {{U:pp}} lower, accuracies at most {100 * LOST_ACCURACY:g} pp lower{_DIFFERENCE}",
        "A model that stores the test images and answers with the label of the nearest one withstands attacks on them "
        "and ranks first without having learned anything. The model's hash decides which images this check draws.",
        "A model that has seen test images, also in training, has no robust accuracy on them: evaluate it on new "
        "ones. If it has not, the training images are of another kind or have wrong labels: repair the data.",
    ),
}
CHECKS: dict[str, Check] = {code: replace(check, code=code) for code, check in _CHECKS.items()}
