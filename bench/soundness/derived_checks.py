"""The soundness checks that are derived from records or are tests of the harness (bench.soundness.verdicts). Text."""

from __future__ import annotations

from bench.soundness.checks import Check

DERIVED: tuple[Check, ...] = (
    Check(
        "C13",
        "A black-box attack does not win",
        "how much Square, which sees scores only, lowers the worst case of the white-box attacks",
        "more than 0.2 pp (AutoAttack's value): F; more than 2 pp: U",
        "U",
        "records",
        "An attack that may read gradients can do all that a blind one can. Where the blind one finds more, gradients "
        "are masked (AutoAttack's flags; Carlini et al. 2019, arXiv 1902.06705).",
        "Look at C4, C9 and C19 for the cause; give a surrogate and attack again. The worst case counts Square's "
        "images in any case.",
    ),
    Check(
        "C14",
        "A transferred attack does not win",
        "how much adversarial images of the undefended twin and of every other defense lower the white-box worst case",
        "more than 0.5 pp",
        "F",
        "records",
        "Images made on another model know nothing of this one. Where they break more than its own gradients do, "
        "those mislead (Athalye et al. 2018, arXiv 1802.00420).",
        "Add `transfer` to the attacks: its images join the worst case. Then look for the cause with C4 and C19.",
    ),
    Check(
        "C15",
        "Losses agree",
        "difference between the accuracies under cross-entropy and under a margin loss (cw or dlr), same attack",
        "5 pp",
        "F",
        "records",
        "Cross-entropy saturates for large logits and the margin does not; a gap says that one of the two attacks is "
        "stuck (Croce and Hein 2020, arXiv 2003.01690).",
        "Report the worst case of both; scale logits down, or rank by AutoAttack, which uses several losses.",
    ),
    Check(
        "C16",
        "The budget is kept",
        "the stored adversarial images, measured again in a fresh process and in float64: norm, pixel range, shape, "
        "labels, and the accuracy recomputed from them",
        "norm at most eps + 1e-6, inside [0,1], every image; recomputed accuracy equal",
        "X",
        "images",
        "An image outside ball or box is no adversarial example, and one clipped afterwards is another image than the "
        "one that was scored. A number that cannot be recomputed is no result (DEEPSEC, its issues).",
        "Run the cell again (delete its folder under results/); if it returns, report the attack that made them.",
    ),
    Check(
        "C20",
        "Known answers come out",
        "robust accuracy of models whose value is published, under the standard attack",
        "an undefended CIFAR-10 net at most 1 % at 8/255; two RobustBench models within 0.3 pp on 10 000 images",
        "X",
        "harness",
        "A harness that gets published numbers wrong gets others wrong too. It needs the data and the weights of the "
        "zoo, and speaks of the harness, not of one row.",
        "Run it where the weights are at hand; until then this question is open, and the tables say not checked.",
    ),
    Check(
        "C21",
        "Worst case for each image",
        "is the headline the minimum over all attacks for each image, clean errors included?",
        "always: tables are made so, never an average over attacks",
        "I",
        "harness",
        "A model that one attack breaks in half of its images and another in the other half has accuracy 0, and an "
        "average of 50 % (Carlini et al. 2019, arXiv 1902.06705; DEEPSEC, its issues).",
        "Nothing: the table is generated so. Of other tables, ask which one they print.",
    ),
    Check(
        "C22",
        "Enough images",
        "number of images, and the 95 % interval that follows from it",
        "at least 1 000, or the whole test set: below, the row is provisional",
        "I",
        "records",
        "At 50 % the exact interval is +-10 pp with 100 images, 6.3 with 256, 3.2 with 1 000 and 1.0 with 10 000. A "
        "difference inside it is chance.",
        "Evaluate 1 000 images (`--n 1000`) before comparing, 10 000 before publishing; ties are decided by the paired "
        "test, not by eye.",
    ),
    Check(
        "C23",
        "Enough seeds",
        "number of training seeds behind the row",
        "3 for any claim of difference; below, the row is marked",
        "I",
        "records",
        "Two trainings of the same method differ by up to a few points. With one seed, luck and method cannot be told "
        "apart.",
        "Train with `--seeds 0,1,2`; mean and deviation then stand in the row.",
    ),
    Check(
        "C24",
        "Enough attack",
        "forward and backward passes of each attack on each image, as counted",
        "at least those of PGD with 50 steps and 5 restarts, or AutoAttack standard; below, the row is not ranked",
        "F",
        "records",
        "A weak attack gives a high number. Accuracy under PGD-10 is compared with accuracy under AutoAttack every "
        "year (Carlini et al. 2019, arXiv 1902.06705; AttackBench, arXiv 2404.19460, compares at equal cost).",
        "Add `autoattack`, or PGD with steps=50 restarts=5.",
    ),
    Check(
        "C25",
        "A certificate holds",
        "certified accuracy at a radius against accuracy under attack with that budget in the same norm",
        "certified not above attacked, beyond the intervals of both",
        "X",
        "records",
        "A certificate says that no attack of that size works. One attack that does is a proof of an error: in the "
        "certificate, in its radius, or in the norm (Cohen et al. 2019, arXiv 1902.02918).",
        "Check the units of the radius (L2, [0,1]), that noise is added before normalization, and that fresh draws "
        "count the class, not those which chose it.",
    ),
    Check(
        "C26",
        "No catastrophic overfitting",
        "validation accuracy under PGD and under FGSM during training",
        "PGD falls by more than 20 pp while FGSM rises",
        "F",
        "records",
        "One-step adversarial training can learn to fool the one step: accuracy near 100 % under FGSM, 0 % under PGD "
        "(Wong et al. 2020, arXiv 2001.03994; Andriushchenko and Flammarion 2020, arXiv 2007.02617).",
        "Take the checkpoint that validation chose, train with more steps, a smaller step or a regularizer.",
    ),
    Check(
        "C27",
        "No peeking at the test set",
        "were checkpoint and attack settings chosen on a validation split, whose hash is stored?",
        "a chosen checkpoint names the split that chose it, and it shares no image with the test set",
        "U",
        "records",
        "A checkpoint chosen by its test accuracy reports the luck of many draws. The best epoch on the test set lies "
        "above the last one by whole points (Rice et al. 2020, arXiv 2002.11569).",
        "Set `validation` in the data section and read the row of `best`; or report `last`.",
    ),
    Check(
        "C28",
        "An adaptive attack exists",
        "does the defense come with an attack made for it, or with the reason why a standard one is adaptive?",
        "yes, or argued; missing: F",
        "F",
        "records",
        "Standard attacks broke few of the defenses that fell; attacks that knew the defense broke them all (Tramer et "
        "al. 2020, arXiv 2002.08347).",
        "Write an attack that knows the mechanism (a surrogate, EOT, the defense's own loss), or say in the defense's "
        "file why plain gradients see all of it.",
    ),
)
