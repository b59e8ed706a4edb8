"""Text detectors: personal data, scripts and mojibake."""

import numpy as np
import pytest

from ftdata.inspection import text_detectors


@pytest.mark.parametrize(("text", "right"), [("4111 1111 1111 1111", True), ("4111-1111-1111-1112", False), ("DE89370400440532013000", True),
    ("DE88370400440532013000", False), ("078-05-1120", True), ("000-12-3456", False), ("8.8.8.8", True), ("192.168.0.1", False), ("1.2.3.4.5", False),
    ("+44 20 7946 0958", True), ("3.14159265358979", False), ("2024-01-02 10:20", False), ("sk-" + "a1" * 12, True), ("ada@lovelace", False)])  # fmt: skip
def test_personal_data_is_detected(text, right):
    assert bool(list(text_detectors.find_personal_data(f"see {text} there"))) is right


def test_script_of_mixed_text_is_detected():
    assert text_detectors.SCRIPTS[text_detectors.detect_script("HTTP ответ сервера")] == "Cyrillic"
    assert text_detectors.detect_script("1234 + 5") == -1
    assert text_detectors.detect_script("→ ∑ ✓") == -1
    assert np.unique([text_detectors.detect_script(text) for text in ("ascii", "naïve", "Straße", "Ứng")]).tolist() == [
        0
    ]


@pytest.mark.parametrize("text", ["Ã–sterreich", "â†’ next", "5 â‚¬", "Â¡Hola!", "it\x92s", "NoÃ«l", "РџСЂРёРІРµС‚", "ÎºÎ±Î»Î·Î¼Î­ÏÎ±",
    "×©×œ×•×", "Ù…Ø±Ø­Ø¨Ø§", "ì•ˆë…•", "à¤¨à¤®", "ðŸ˜€", "MiÄ™dzy", "sÅ‚owami", "PÅ™iÅ¡el", "yaÅŸÄ±yorum", "Ä‘Æ°á»", "È˜i", "itâ€™s", "ã\x81\x93ã\x82\x93"])  # fmt: skip
def test_mojibake_is_detected(text):
    assert text_detectors.find_mojibake(text)


@pytest.mark.parametrize(
    "text",
    [
        "“CAFÉ”",
        "été…” dit-il",
        "«MANHÃ»",
        "à « demain »",
        "Ñandú, año",
        "Привет, Россия",
        "×, ÷ ±",
        "şÎnceput",
        "Üben–Ärger",
        "…”",
        "naïve—à",
    ],
)
def test_correctly_encoded_text_is_not_mojibake(text):
    assert text_detectors.find_mojibake(text) is None
