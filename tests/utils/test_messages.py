from tl_lightning.utils.messages import unknown


def test_unknown_name_without_a_similar_one_lists_at_most_forty() -> None:
    assert unknown("class", "zebra", ["ant", "bee"]) == "unknown class 'zebra'; there are ant, bee"
    assert unknown("model", "zebra", [f"m{n:02d}" for n in range(42)], of="timm").endswith("m38, m39 and 2 more")
