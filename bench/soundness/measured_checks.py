"""The soundness checks that an audit measures on the model itself (bench.soundness.audit_model). Text."""

from __future__ import annotations

from bench.soundness.checks import Check

MEASURED: tuple[Check, ...] = (
    Check(
        "C1",
        "The same image gets the same answer",
        "5 passes over the same batch, then the first images alone and in another order: label flips and the largest "
        "gap between logits divided by their L2 norm",
        "0 flips and a gap of 1e-4 (AutoAttack's value; 1e-3 between batches); a model that declares its noise: I",
        "U",
        "model",
        "An attack judged by one noisy pass counts luck as success and noise as defense, in both directions. A model "
        "that looks at the rest of its batch (BatchNorm in train mode) is another model for each batch size, and "
        "dropout left on is noise that nobody declared (AutoAttack's flags; Athalye et al. 2018, arXiv 1802.00420).",
        "Put the model in eval mode and make BatchNorm use its running statistics. Is the noise the defense itself? "
        "Set `stochastic = True` on its Classifier: it is then judged by gradients averaged over draws and by fresh "
        "draws, in a section of its own.",
    ),
    Check(
        "C2",
        "The model gives logits, not probabilities",
        "do all rows sum to 1 and hold no negative value (softmax), or is their logsumexp 0 (log-softmax)?",
        "within 1e-5 on all rows",
        "F",
        "model",
        "Losses apply softmax themselves: applied twice, it flattens gradients, and a confident model saturates, so "
        "attacks on cross-entropy stall. AutoAttack's own test misses log-softmax.",
        "Leave out the last softmax or log_softmax of `forward`; predictions do not change.",
    ),
    Check(
        "C3",
        "All numbers are finite",
        "NaN or Inf in logits, loss, input gradient or adversarial images",
        "none",
        "X",
        "model",
        "A comparison with NaN is false, so an attack that meets one stops moving without a word, and its failure "
        "reads as robustness. No number of such a row means anything.",
        "Find the operation that gives it: sqrt or norm at 0, log of 0, division by a zero deviation, overflow in "
        "half precision. Add a small constant there, and train again if the weights themselves are not finite.",
    ),
    Check(
        "C4",
        "Gradients are not zero",
        "share of correctly classified images whose input gradient is exactly 0, for each loss (ce, cw, dlr)",
        "more than 1 %: F; more than 10 % for every loss: U, unless a gradient-free attack is in the set as well",
        "U",
        "model",
        "Without a gradient a gradient attack returns its starting point. Rounding, thresholds and saturated outputs "
        "do that, and hide weakness instead of removing it (gradient masking, Athalye et al. 2018, arXiv 1802.00420; "
        "AutoAttack's flags; Pintor et al. 2022, arXiv 2106.09947).",
        "Where only ce is zero the logits are too large: read the rows of cw or dlr. Else override `surrogate` with a "
        "differentiable stand-in for the rounding step (BPDA), and add `square`.",
    ),
    Check(
        "C5",
        "There is a gradient path to the input",
        "one backward pass from the loss to the image: does autograd raise, or find no path?",
        "a path exists",
        "U",
        "model",
        "A cut graph (detach, no_grad, argmax, NumPy inside forward) stops every gradient attack, whatever the model "
        "is worth (Athalye et al. 2018, arXiv 1802.00420). AutoAttack then simply fails.",
        "Remove the cut, or override `surrogate` with a differentiable stand-in (BPDA); attacks climb that, and are "
        "scored on the model itself.",
    ),
    Check(
        "C6",
        "No optimization at test time",
        "automatic differentiation inside one forward pass without gradients, and how often each layer runs for one "
        "prediction",
        "0 calls; half of the layers run at most 3 times (F where single layers run more often)",
        "U",
        "model",
        "A model that purifies its input by gradient steps, or adapts itself to it, has gradients that a standard "
        "attack does not see; most such defenses fell to attacks made for them (Croce et al. 2022, arXiv 2202.13711).",
        "Rank it only with an adaptive attack of its own: through the whole optimization (unrolled or implicit), or "
        "BPDA, beside transfer and black-box attacks; and compare at equal inference time.",
    ),
    Check(
        "C7",
        "Many steps beat one",
        "accuracy under PGD against accuracy under FGSM at the same eps",
        "PGD at most 1 pp above FGSM; above in the worst case of all PGD losses: U",
        "U",
        "model",
        "PGD can make the very step of FGSM, so where it does worse its gradients mislead it: the loss surface is "
        "shattered or masked around the image (Carlini et al. 2019, arXiv 1902.06705; Athalye et al. 2018).",
        "Add restarts and steps, the losses cw and dlr, and `square`; look at the loss along the attack's path.",
    ),
    Check(
        "C8",
        "A larger budget finds more",
        "accuracy under PGD at 0, 1/8, 1/4, 1/2, 1, 2 and 4 times the largest budget (0 to 32/255 for 8/255), "
        "each from scratch and each continued from the last",
        "no rise of more than 1 pp; continued from the last: none at all",
        "U",
        "model",
        "A larger ball holds the smaller one, so accuracy in it cannot be higher. Where the measured one rises, the "
        "attack and not the model sets the number (Carlini et al. 2019, arXiv 1902.06705).",
        "Plot accuracy against eps. A rise at small eps means masked gradients there: add losses, restarts and "
        "`square`. A rise at large eps alone mostly means too few or too short steps.",
    ),
    Check(
        "C9",
        "An unbounded attack wins",
        "accuracy under PGD in a ball that holds every image: eps 1 for Linf, sqrt(pixels) for L2, pixels for L1",
        "at most 1 %; above: F, above 10 %: U",
        "U",
        "model",
        "With any image allowed, some image of another class is in reach, so the true accuracy is 0. What is left is "
        "the attack's failure, at every smaller eps too (Carlini et al. 2019, arXiv 1902.06705).",
        "Repair the attack before reading any number: other losses, a surrogate for the step that stops gradients, "
        "`square`. A model that gives one class for every image fails here as well: look at its clean accuracy.",
    ),
    Check(
        "C10",
        "The attack has converged",
        "PGD with twice the steps and with twice the restarts; share of robust images whose best loss gained more than "
        "5 % of its range in the last 10 steps",
        "at most 0.5 pp lower each; at most 5 % of the robust images",
        "F",
        "model",
        "Where twice the effort breaks more, the accuracy printed is that of an attack stopped half-way "
        "(Carlini et al. 2019, arXiv 1902.06705; incomplete optimization in Pintor et al. 2022, arXiv 2106.09947).",
        "Raise steps and restarts until the number stands still, or rank by AutoAttack.",
    ),
    Check(
        "C11",
        "What the attack met, it returns",
        "images broken by a point on the attack's path, and not by the point that it returned",
        "none",
        "F",
        "model",
        "An attack that returns its last iterate forgets successes (silent success, Pintor et al. 2022, "
        "arXiv 2106.09947). Our PGD keeps the best point, so a count above 0 says that the model which the attack "
        "climbs and the model which is scored disagree.",
        "Compare `surrogate()` with the deployed prediction, and see C1 for a model that changes between passes.",
    ),
    Check(
        "C12",
        "Noise does not beat the gradient",
        "accuracy under the best of 1 000 random draws from the ball (10 000 with --checks full) against the gradient "
        "attacks",
        "noise at most 1 pp lower",
        "U",
        "model",
        "Random search without any gradient is the weakest attack there is. Where it wins, the gradients lead "
        "nowhere (Carlini et al. 2019, arXiv 1902.06705; Athalye et al. 2018, arXiv 1802.00420).",
        "Treat every gradient attack on this model as void; use `square`, transfer and a surrogate.",
    ),
    Check(
        "C17",
        "An attack leaves no trace",
        "accuracy at eps 0 against clean accuracy; weights, buffers, modes and gradients before and after attacks",
        "equal, bit for bit",
        "X",
        "model",
        "An attack that changes what it attacks (a library that leaves layers in train mode, a model that counts or "
        "learns in forward) makes every later number that of another model (torchattacks, issues 21 and 124).",
        "Find what `forward` writes to: buffers that are updated, layers that switch their own mode, gradients left "
        "on parameters.",
    ),
    Check(
        "C18",
        "The model takes images in [0,1]",
        "accuracy on raw images in [0,1] against the claimed one, and against the same images in other scales "
        "(0 to 255, -1 to 1, mean 0 and deviation 1)",
        "1 pp below the claim, beyond the 99.9 % interval: X; another scale better by more than 10 pp and three "
        "deviations: X; an Linf budget below half a gray level (1/510): F",
        "X",
        "model",
        "Budgets are in units of [0,1]. A model that expects another scale is attacked with a budget that is wrong by "
        "the factor (255, or the deviation of the data) and looks weak or robust for no reason.",
        "Put the normalization inside the model as its first layer, once, and give it images in [0,1]; write eps as "
        "8/255, neither 8 nor 8/255/255.",
    ),
    Check(
        "C19",
        "The attack finds what was planted",
        "for each image, a two-class head on the model's own features that has a known adversarial point inside the "
        "ball, and none among random points; share of images where PGD breaks it",
        "at least 95 %",
        "U",
        "model",
        "An attack that misses a point known to be there proves nothing when it finds none elsewhere: of 13 published "
        "evaluations of defenses that were broken later, 11 fail this test (Zimmermann et al. 2022, arXiv 2206.13991).",
        "Something between image and last layer stops the gradient: give a surrogate for it, or attack without "
        "gradients. Do not read robustness from PGD or from APGD here.",
    ),
    Check(
        "C29",
        "The loss is smooth at small scale",
        "mean relative change of the margin under 100 random moves of a twentieth of the budget from the images",
        "at most 0.1",
        "F",
        "model",
        "Where a tiny random move changes the loss much, one gradient says little about the next step, and attacks "
        "wander (unstable predictions, Pintor et al. 2022, arXiv 2106.09947; shattered gradients, arXiv 1802.00420).",
        "Average the gradient over random moves (EOT over the input), or add `square`; a surrogate without the rough "
        "layer helps most.",
    ),
)
