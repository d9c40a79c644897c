"""The fixed texts of a grid's page: what was asked, what each section is, and the words that it uses."""

from markupsafe import Markup

PAPER = "https://arxiv.org/abs/2412.20070"
ASKED = Markup(
    "A medical image has a <b>modality</b>, an anatomical <b>area</b> and a <b>task</b> that is asked of it. Does a "
    "multimodal language model answer about a combination of the three that it was never trained on, once it has met "
    "each element in other combinations? This repeats the study of "
    f'<a href="{PAPER}">arXiv 2412.20070</a> (Med-MAT): models are fine-tuned '
    "on subsets which share elements with a <i>target</i> combination, and tested on the target, whose images none of "
    "them has seen. <b>Baseline</b> is the model before fine-tuning, <b>Baseline+</b> is fine-tuned on subsets that "
    "share nothing with the target, <b>Trained</b> on related ones. A gain over Baseline+ is not yet composition: one "
    "subset may have brought it all. So each subset was also trained on alone, and with unrelated data in place of the "
    "others."
)
GLOSSARY = (
    (
        "subset",
        "All images and questions of one modality, area and task, such as CT, liver, stage. A number in Med-MAT.",
    ),
    ("target", "The subset that a model is tested on and was not trained on."),
    ("row", "A target with the subsets that one training for it uses, as a row of the paper's tables."),
    (
        "direction",
        "Which element both subsets of a pair share with the target: fixed modality, area or task; in a "
        "modality-area pair one subset shares these two, and the other the task.",
    ),
    (
        "arm",
        "What a model of a row was trained on: nothing (Baseline), unrelated data (Baseline+), the related subsets "
        "(Trained), or one of the controls.",
    ),
    ("base", "The model before any fine-tuning; of phantoms it is pre-trained on phantoms with other questions."),
    ("First alone, Second alone", "One subset of the row alone, with as many records and updates as Trained."),
    ("filler: First with unrelated", "One subset, and unrelated records in place of the others'."),
    ("Words of the task", "Subsets that share the task alone: its words without its modality and area."),
    ("Without images", "Trained's questions and answers without their images."),
    (
        "interaction",
        "What the subsets gain together beyond the sum of what each adds to unrelated data. Composition "
        "needs it above 0.",
    ),
    ("cell", "One arm of one row with one seed: a fine-tune and its test. Cells of equal data share a training."),
    (
        "seed",
        "A repeat of everything random. Only several seeds say something of the recipe, not of these models alone.",
    ),
    ("letters", "Questions offer options A, B, ...; the answer is the letter that the model finds likeliest."),
    ("chance", "The accuracy of answering at random among the options offered."),
    (
        "ceiling",
        "The best accuracy of anybody who knows only what an arm's training shares with the target (phantoms).",
    ),
    (
        "Holm, McNemar, Wilson",
        "An adjustment of p for many comparisons; an exact test of two models on the same "
        "questions; an interval of an accuracy.",
    ),
)
# Table of the study -> title of its section.
STUDY = {
    "pairs": "Pairs: two related subsets",
    "triples": "Triples: three subsets, one shared element each",
    "detection_pairs": "Detection pairs: a subset with boxes, and one of questions",
    "ablation": "Ablation: what each element is worth",
    "multi_task": "Multi-task against single-task",
    "efficiency": "Data efficiency",
    "dose": "Dose-response: how many related subsets",
    "detection": "Detection: boxes asked for",
}
# Table of the study -> introduction of its section.
INTROS = {
    "pairs": "Each target is a combination that the model was not trained on. Its two training subsets share two "
    "elements with it each, and between them all three; the direction says which element both have. In the "
    "modality-area pair one shares these two and the other the task alone.",
    "triples": "The strict form: modality, area and task each come from another subset.",
    "detection_pairs": "As pairs, but one of the two training subsets has boxes in place of options: its images are of "
    "the same kind, what is asked of them is where something lies. Only answers to choice questions are tested.",
    "ablation": "All subsets that share an element with the target, less those that share a given one.",
    "multi_task": "One model of all in-distribution subsets against one model per subset, with the same records of "
    "each; and the same model on combinations that were held out.",
    "efficiency": "How many records of the target itself the related subsets are worth.",
    "dose": "More related subsets with fewer records of each: what is left to gain once each element has been met.",
    "detection": "One model of all subsets with boxes but those held out, asked where the lesions of test images are: "
    "of the subsets it was trained on, and of combinations of a modality and an area that were held out.",
}
CARDS = (
    "The bar marks the right option, the shade the one answered, and the number is its probability among those "
    "offered. Records were drawn by a hash of their names, so many right and so many wrong; how often each occurs is "
    "in the tables."
)
SUBSETS = (
    "A page for each subset that was tested: its scores in every table, what is taken for what, and the most confident "
    "mistakes with their images. The share beside a name is the accuracy of the answers looked at there: those of the "
    "one model that its page names."
)
LETTERS = (
    "Accuracy is by likelihood: the offered letter that the model finds likeliest. A model that favours a letter, or "
    "that puts little probability on letters at all, has not understood the question; both would show here."
)
BASE = (
    "What is there before a fine-tune, target by target: whether the right option can be read from the image features "
    "that the base gives its decoder, by a linear probe trained on images of the target itself (no arm of pairs, triples "
    "and ablations is); and what the words of the question give alone, beside a grey image or without one."
)
PUBLISHED = (
    "Printed accuracies are those of arXiv 2412.20070, version 1 (December 2024); version 2 moves some of them. They "
    "are printed without test sizes, and were got with another model, other splits or other settings wherever those "
    "are not stated: agreement or difference of single rows says little."
)
MADE = Markup(
    "By <code>medcg reproduce</code> with the configuration below; <code>medcg report DIR</code> writes this page "
    "again from the grid's files alone."
)
ORIGINS = Markup(
    "All numbers come from the grid's own folder: what each cell was trained and tested on, its steps and seconds from "
    "<code>cells.csv</code>; counts of right answers and Wilson intervals from <code>results.csv</code>; every paired "
    "comparison, letter, free answer and label from <code>predictions/</code>; the tests asked again from "
    "<code>controls/</code>; boxes from <code>boxes/</code>; losses from <code>metrics/</code>; images in training and "
    "tests from <code>contamination.csv</code>; what a linear probe reads from <code>probe.csv</code>; where the time went "
    "from <code>goodput.json</code> (goodput: the share of the time that went into training steps that counted); settings, "
    "versions and fingerprints from <code>config.json</code>. Images are read from the data that <code>config.json</code> "
    "names, if their fingerprint is still the one recorded. Printed numbers are those of the paper's tables, kept with "
    "the code."
)
CITATION = Markup(
    f'The study: <a href="{PAPER}">arXiv 2412.20070</a>, '
    '<a href="https://doi.org/10.18653/v1/2025.acl-long.639">ACL 2025</a>. This page: medcg-jax with its version and '
    "commit above; CITATION.cff of the project says how."
    "<pre>@article{cai2024compositional,\n"
    "  title   = {On the Compositional Generalization of Multimodal {LLM}s for Medical Imaging},\n"
    "  author  = {Cai, Zhenyang and Chen, Junying and Wang, Rongsheng and Wang, Weihong and Deng, Yonglin and\n"
    "             Song, Dingjie and Chen, Yize and Zhang, Zixu and Wang, Benyou},\n"
    "  journal = {arXiv preprint arXiv:2412.20070},\n"
    "  year    = {2024}\n}</pre>"
)
