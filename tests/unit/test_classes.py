"""Class sets: what a file may say, how one set is mapped into another, and what the shipped ones hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from mfm_dist.build import build_train_module, open_readers
from mfm_dist.classes import (
    IGNORE_INDEX,
    MOST_CLASSES,
    ClassSet,
    colour_code,
    generated_palette,
    read_classes,
    read_colour,
)
from mfm_dist.config.class_files import ClassFile, load_class_file, load_class_set, shipped_class_sets
from mfm_dist.config.loader import load_config
from mfm_dist.data.manifest import MANIFEST_FILE
from mfm_dist.data.reader import Sample, ShardReader
from mfm_dist.errors import ConfigError, DataError
from tests.helpers.classes import CLASSES
from tests.helpers.modules import config_with
from tests.helpers.shards import ShardFolder

CITYSCAPES7 = load_class_set("cityscapes7")
ABC = ClassSet(names=("a", "b", "c"), palette=((0, 0, 1), (0, 0, 2), (0, 0, 3)))


def read(**tree: object) -> ClassFile:
    return ClassFile(*read_classes(tree, "x.yaml"))


def problems_of(**tree: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(**tree)
    return caught.value.problems


def test_a_file_of_ids() -> None:
    classes, labels = read(
        names=["soil", "crop"],
        ids={3: "soil", "10": "crop", 11: "crop"},
        ignore=[0],
        things="crop",
        groups={"g": ["soil"]},
    )
    assert classes.names == ("soil", "crop")
    assert classes.things == ("crop",)
    assert classes.groups == {"g": ("soil",)}
    assert labels is not None
    assert (dict(labels.classes), labels.colours, labels.others_ignored) == (
        {3: 0, 10: 1, 11: 1, 0: IGNORE_INDEX}, False, False
    )  # fmt: skip
    others = read(names=["soil"], ids={3: "soil"}, ignore="others").labels
    assert others is not None
    assert others.others_ignored


def test_a_file_of_colours_has_them_for_a_palette_too() -> None:
    colours = {"#804080": "soil", "1 2 3": "crop", "4, 5, 6": "crop"}
    classes, labels = read(names=["soil", "crop", "sky"], colours=colours, palette={"soil": [9, 9, 9]})
    assert classes.palette[:2] == ((9, 9, 9), (1, 2, 3))
    assert labels is not None
    assert labels.colours
    assert dict(labels.classes) == {colour_code((128, 64, 128)): 0, 0x010203: 1, 0x040506: 1}


@pytest.mark.parametrize("value", ["#80408", "red", "1 2", "1 2 256", [1, 2], [1, 2, "3"], [1, 2, True], 7, None])
def test_what_is_no_colour(value: object) -> None:
    assert read_colour(value) is None


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({}, "names: are missing"),
        ({"names": ["a", "a"]}, "names: 'a' is there twice"),
        ({"names": [True, "b"]}, "True is no name"),
        ({"names": ["ignore"]}, "'ignore' is no class"),
        ({"names": [str(i) for i in range(MOST_CLASSES + 1)]}, "256 classes are too many"),
        ({"names": ["a"], "colors": {}}, "unknown key 'colors'"),
        ({"names": ["a"], "ids": {1: "b"}}, "ids: b not in names, which are a"),
        ({"names": ["a"], "ids": {65536: "a"}}, "65536 is no id"),
        ({"names": ["a"], "ids": {-1: "a"}}, "-1 is no id"),
        ({"names": ["a"], "ids": {1: "a"}, "ignore": [1]}, "1 stands for a class, too"),
        ({"names": ["a"], "ids": {1: "a"}, "ignore": "rest"}, "ignore (others, or a list): 'rest' is no id"),
        ({"names": ["a"], "ids": {1: "a"}, "colours": {}}, "labels hold one or the other"),
        ({"names": ["a"], "ignore": [1]}, "says nothing without ids or colours"),
        ({"names": ["a"], "colours": {"red": "a"}}, "'red' is no colour"),
        ({"names": ["a"], "ids": [1]}, "ids: expected a mapping"),
        ({"names": ["a"], "things": ["b"]}, "things: b not in names"),
        ({"names": ["a"], "groups": {"g": ["b"]}}, "groups.g: b not in names"),
        ({"names": ["a"], "merges": {"b": ["x"]}}, "merges: b not in names"),
        ({"names": ["a", "b"], "merges": {"a": ["x"], "b": ["x"]}}, "'x' is taken in by two classes"),
        ({"names": ["a", "b"], "merges": {"a": ["b"]}}, "'b' is a class of this set itself"),
        ({"names": ["a", "b"], "palette": ["#000001"]}, "1 colours for 2 classes"),
        ({"names": ["a", "b"], "palette": {"a": "#000001", "b": "#000001"}}, "the colour of two classes"),
    ],
)
def test_a_mistake_is_told(tree: dict[str, object], problem: str) -> None:
    (told,) = problems_of(**tree)
    assert told.startswith("x.yaml: ")
    assert problem in told


def test_all_mistakes_are_told_at_once() -> None:
    assert len(problems_of(names=["a", "a"], ids={1: "b"}, things=["c"], colour={})) == 4


def test_as_many_classes_as_a_byte_holds_have_colours_of_their_own() -> None:
    classes, _ = read(names=[str(i) for i in range(MOST_CLASSES)])
    assert len(set(classes.palette)) == len(classes) == MOST_CLASSES
    few = np.array(generated_palette(12), dtype=int)
    distance = np.abs(few[:, None] - few[None]).sum(axis=-1) + 1000 * np.eye(12, dtype=int)
    assert distance.min() > 60
    assert few.sum(axis=1).min() > 60  # black is what has no class


@pytest.mark.parametrize("name", shipped_class_sets())
def test_a_shipped_set_reads_back_from_json(name: str) -> None:
    classes = load_class_set(name)
    assert ClassSet.from_tree(json.loads(json.dumps(classes.to_tree())), name) == classes


def test_shipped_sets_are_parts_of_cityscapes() -> None:
    """The colours of a class are the same in all, and the sets of SYNTHIA are the groups of their names."""
    colours = dict(zip(CLASSES.names, CLASSES.palette, strict=True))
    for name in ("synthia16", "synthia13", "cityscapes19_ids"):
        classes = load_class_set(name)
        assert dict(zip(classes.names, classes.palette, strict=True)) == {one: colours[one] for one in classes.names}
        assert classes.things == tuple(one for one in CLASSES.things if one in classes.names)
        assert name == "cityscapes19_ids" or classes.names == CLASSES.groups[name]
    relabelling = CITYSCAPES7.relabelling(CLASSES)
    assert relabelling is not None
    assert (relabelling.ignored, relabelling.absent) == ((), ())


def test_ids_give_the_same_classes_as_names() -> None:
    """Where the 19 classes have an id, its category is the class that merges it."""
    of_ids, merged = load_class_file("cityscapes7").labels, CITYSCAPES7.relabelling(CLASSES)
    full = load_class_file("cityscapes19_ids").labels
    assert of_ids is not None
    assert full is not None
    assert merged is not None
    for value, index in full.classes.items():
        if index != IGNORE_INDEX:
            assert of_ids.classes[value] == merged.table[index]


def test_a_file_that_is_not_there_or_has_a_list_for_a_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'cityscapes7'"):
        load_class_file("cityscape7")
    (tmp_path / "c.yaml").write_text("names: [a]\ncolours: {[1, 2, 3]: a}\n")
    with pytest.raises(ConfigError, match="'128 64 128'"):
        load_class_file(str(tmp_path / "c.yaml"))


def test_the_file_in_the_guide_is_one() -> None:
    guide = Path(__file__).parents[2] / "docs/data.md"
    text = guide.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    classes, labels = read_classes(yaml.safe_load(text), "docs/data.md")
    assert classes.merges == {"crop": ("maize", "wheat")}
    assert labels is not None
    assert set(labels.classes) == {3, 10, 11, 12, 0, 255}


def test_a_relabelling_is_by_merged_name_then_by_name() -> None:
    own = ClassSet(names=("c", "x", "y"), palette=ABC.palette, merges={"x": ("a",)})
    relabelling = own.relabelling(ABC)
    assert relabelling is not None
    assert (relabelling.table, relabelling.ignored, relabelling.absent) == ((1, IGNORE_INDEX, 0), ("b",), ("y",))
    assert relabelling.apply(np.array([[0, 1, 2, 255]], dtype=np.uint8)).tolist() == [[1, 255, 0, 255]]
    assert relabelling.sum_counts(np.array([[5, 6, 7]], dtype=np.uint32)).tolist() == [[7, 5, 0]]
    assert ABC.relabelling(ABC) is None
    backwards = ClassSet(names=("c", "b", "a"), palette=ABC.palette).relabelling(ABC)
    assert backwards is not None
    assert backwards.table == (2, 1, 0)


def test_a_reader_gives_labels_and_statistics_in_the_classes_asked_for(shard_folder: ShardFolder) -> None:
    folder = shard_folder(count=5, shard_size=2)
    stored, merged = ShardReader(folder), ShardReader(folder, classes=CITYSCAPES7)
    category = {name: into for into, names in CITYSCAPES7.merges.items() for name in names} | {"sky": "sky"}
    expected = {CLASSES.names.index(name): CITYSCAPES7.names.index(into) for name, into in category.items()}
    expected[IGNORE_INDEX] = IGNORE_INDEX
    statistics = np.concatenate(list(merged.class_statistics()))
    for number in range(5):
        before, after = stored.read(number), merged.read(number)
        assert isinstance(before, Sample)
        assert isinstance(after, Sample)
        assert before.label is not None
        assert after.label is not None
        assert after.label.tolist() == [[expected[value] for value in row] for row in before.label.tolist()]
        assert statistics[number].tolist() == [int((after.label == index).sum()) for index in range(7)]
    assert merged.fingerprint == stored.fingerprint
    with pytest.raises(ConfigError, match="none of its classes"):
        ShardReader(folder, classes=ABC)


def test_shards_of_the_format_before_are_read_where_their_classes_are_known(shard_folder: ShardFolder) -> None:
    folder = shard_folder()
    content = json.loads((folder / MANIFEST_FILE).read_text())
    content |= {"format": 1, "class_names": content.pop("classes")["names"]}
    (folder / MANIFEST_FILE).write_text(json.dumps(content))
    assert ShardReader(folder).classes == CLASSES
    content["class_names"].reverse()
    (folder / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"bicycle, motorcycle.*mfm-shards make test.*--overwrite"):
        ShardReader(folder)


def test_data_classes_lets_sets_with_other_classes_train_together(shard_folder: ShardFolder, tmp_path: Path) -> None:
    """Without it they are refused; what is in no class of the common set is ignored, and said."""
    small = load_class_set("synthia16")
    shard_folder("source", classes=small, num_classes=16)
    for name in ("target", "validation"):
        shard_folder(name)
    where = [f"data.root={tmp_path}", "data.source=source", "data.target=target", "data.validation=validation"]
    with pytest.raises(ConfigError) as caught:
        open_readers(load_config(None, where))
    assert [problem.count("16: road") + problem.count("19: road") for problem in caught.value.problems] == [2, 2]
    readers = open_readers(load_config(None, [*where, "data.classes=synthia16", "eval.class_sets=[synthia13]"]))
    assert readers.classes == small
    (note,) = readers.notes
    assert note.startswith("target, validation: labels of 19: ")
    assert note.endswith("ignored, as none of these: terrain, truck, train")
    assert set(readers.fingerprints) == {"labelled", "target"}
    with pytest.raises(ConfigError, match=r"eval\.class_sets names synthia16; groups of the run's classes: synthia13"):
        open_readers(load_config(None, [*where, "data.classes=synthia16", "eval.class_sets=[synthia16]"]))
    wider = open_readers(load_config(None, [*where, "data.classes=cityscapes19"]))
    assert wider.notes[0].endswith("never labelled: terrain, truck, train")
    assert set(wider.fingerprints) == {"labelled", "target", "relabelling"}


def test_shards_without_labels_agree_with_any_classes(shard_folder: ShardFolder, tmp_path: Path) -> None:
    shard_folder("target", classes=ABC, labelled=False)
    for name in ("source", "validation"):
        shard_folder(name)
    where = [f"data.root={tmp_path}", "data.source=source", "data.target=target", "data.validation=validation"]
    assert open_readers(load_config(None, where)).classes == CLASSES
    with pytest.raises(ConfigError) as caught:
        open_readers(load_config(None, [*where, "data.source=target", "data.validation=target"]))
    first, second = caught.value.problems
    assert re.search(r"^data\.source=\S+target has no labels .* name a labelled set, or pack it again", first)
    assert re.search(r"^data\.validation=\S+target has no labels .* set data\.validation=null", second)
    with pytest.raises(ConfigError, match=r"method\.name=oracle is supervised on them"):
        open_readers(load_config(None, [*where, "method.name=oracle", "data.validation=null"]))
    assert open_readers(load_config(None, [*where, "data.validation=null"])).validation is None


def test_feature_distance_needs_things() -> None:
    config = config_with("method.name=daformer")
    with pytest.raises(ConfigError, match=r"no class is a thing.*data\.classes"):
        build_train_module(config, ABC)
    assert build_train_module(config_with(), ABC).student.decode is not None
