"""Forms of an answer and the value of each, derived by hand. Every right value is compared exactly."""

import string
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_ray.tasks.final_answer import final_number, last_box
from cola_ray.tasks.number_tokens import MAX_DIGITS
from cola_ray.tasks.numerals import number_in

# An answer's text, in LaTeX where there is a backslash or a pair of $; what it is, None for "not one number".
FORMS = [
    # integers, signs
    ("72", 72), ("0", 0), ("-0", 0), ("+3", 3), ("-5", -5), ("−5", -5), ("–5", -5), ("﹣5", -5), ("－5", -5),
    ("‒5", -5),
    ("‑5", -5), ("- 5", -5), ("$-5$", -5), ("--5", None), ("+-5", None), ("±5", None), (r"\pm 5", None), ("5-", None),
    ("5+", None), ("007", 7), ("minus 5", -5), ("negative 5", -5), ("-5 degrees", -5), ("#5", 5), ("x-5", None),
    ("−7/2", "-7/2"), ("(-5)", -5), ("(5)", None), ("($5)", None), (r"\left(5\right)", 5), (r"\left( -5 \right)", -5),
    ("-(5)", None), ("[72]", 72), ("{72}", 72), ('"72"', 72),
    # thousands
    ("1,234", 1234), ("1,234,567", 1234567), ("12,345,678", 12345678), ("1 234", 1234), ("1 234 567", 1234567),
    (r"1\,234", 1234), (r"1\,234\,567", 1234567), (r"1,\!234", 1234), (r"1,\!234,\!567", 1234567), ("1{,}234", 1234),
    (r"1\ 234", 1234), (r"1\;234", 1234), (r"1~234", 1234), ("1'234", 1234), ("1’234’567", 1234567),
    ("1.234.567", 1234567), ("1\u202f234", 1234), ("1\u00a0234", 1234), ("1\u2009234\u2009567", 1234567),
    ("1_000_000", 1000000), ("12,34,567", 1234567), ("1,00,000", 100000), ("10,00,00,000", 100000000),
    ("1,234.56", "30864/25"), ("1.234,56", "30864/25"), ("1 234,56", "30864/25"), ("1 234.56", "30864/25"),
    ("1'234.56", "30864/25"), ("12,34,567.5", "2469135/2"), ("1234,567", None), ("1,23", None), ("1,2345", None),
    ("12,3456,789", None), ("1,234.567,8", None), ("1.2.3", None), ("1,2,3", None), ("3,4", None), ("3, 4", None),
    ("3 4", None), ("12 34", None), ("2020 300", None), ("0 123", None), ("1 234 56", None), ("1,234 567", None),
    ("1  234", None), ("1\n234", None), ("1,234,", 1234), ("1.5,2.5", None),
    # decimals
    ("3.5", "7/2"), ("0.50", "1/2"), (".5", "1/2"), ("-.5", "-1/2"), ("5.", 5), ("5.0", 5), ("72.00", 72),
    ("0.1", "1/10"), ("1.234", "617/500"), ("0,5", "1/2"), ("0,125", "1/8"), ("0.0", 0), ("12,50 €", "25/2"),
    ("€12,50", "25/2"), ("1.234,50 €", "2469/2"), ("3.14...", None), (r"3.14\ldots", None), (r"0.\overline{3}", None),
    ("0.(3)", None), ("72...", 72), ("3.", 3), (",5", None), ("3·4", None),
    # fractions, mixed numbers
    ("7/2", "7/2"), ("7 / 2", "7/2"), ("7⁄2", "7/2"), ("7∕2", "7/2"), (r"\frac{7}{2}", "7/2"), (r"\dfrac{7}{2}", "7/2"),
    (r"\tfrac{7}{2}", "7/2"), (r"\cfrac72", "7/2"), (r"\frac72", "7/2"), (r"\frac{7}2", "7/2"), (r"\frac7{2}", "7/2"),
    (r"\frac 7 2", "7/2"), (r"-\frac{7}{2}", "-7/2"), (r"\frac{-7}{2}", "-7/2"), (r"\frac{7}{-2}", "-7/2"),
    (r"\frac{1,000}{3}", "1000/3"), (r"\frac{\frac{1}{2}}{3}", "1/6"), (r"\frac{1}{0}", None), ("1/0", None),
    (r"\left(\frac{7}{2}\right)", "7/2"), (r"$\frac{7}{2}$", "7/2"), (r"\( \frac{7}{2} \)", "7/2"),
    (r"{7 \over 2}", "7/2"), (r"\frac{7}", None), (r"\frac{x}{2}", None), (r"\frac{7}{2}x", None),
    (r"\frac{3+4}{2}", None), ("7/2/3", None), ("12/25/2020", None), ("3 1/2", "7/2"), ("3 1⁄2", "7/2"),
    ("-3 1/2", "-7/2"), (r"3\frac12", "7/2"), (r"3\frac{1}{2}", "7/2"), (r"3 \frac{1}{2}", "7/2"),
    (r"3\tfrac12", "7/2"), (r"-3\frac{1}{2}", "-7/2"), ("½", "1/2"), ("3½", "7/2"), ("3 ½", "7/2"), ("-½", "-1/2"),
    ("¾", "3/4"), ("2⅔", "8/3"), ("3 and 1/2", "7/2"), ("3 and a half", "7/2"), ("3-1/2", None), ("3 5/2", None),
    (r"3\cdot\frac12", None), ("1 234/5", None), ("1.5/2", "3/4"), ("1/2 of 10", None), ("3 cups and a half", None),
    ("3 quarters", None), ("1 half", None), ("1/2 cup", "1/2"), ("3 1/2 cups", "7/2"), ("1/x", None), ("1/3", "1/3"),
    ("0.333", "333/1000"),
    # currencies, percent, units
    ("$5", 5), (r"\$5", 5), ("-$5", -5), ("$-5", -5), (r"-\$5", -5), ("$ 5", 5), ("5$", 5), ("5 $", 5), ("€5", 5),
    ("5€", 5), ("5 €", 5), ("£5", 5), ("¥500", 500), ("₹1,00,000", 100000), ("US$5", 5), ("A$5", 5), ("USD 5", 5),
    ("5 USD", 5), ("USD5", 5), ("Rs. 500", 500), ("Rs.500", 500), ("$1,234.50", "2469/2"), (r"\$1{,}234", 1234),
    (r"\pounds 5", 5), ("5 dollars", 5), ("$5.00", 5), ("5¢", 5), ("50%", 50), (r"50\%", 50), ("50 %", 50),
    ("50 percent", 50), ("0.5%", "1/2"), ("٪50", None), ("50% of 10", None), ("72 clips", 72),
    (r"72 \text{ clips in 2 months}", 72), ("72 clips in 2 months", 72), (r"72\text{ clips}", 72),
    (r"72\,\mathrm{cm}", 72), (r"\mathbf{72}", 72), (r"\text{72}", 72), ("5 km/h", 5), ("5km/h", 5), ("5 m/s^2", 5),
    ("5 m^2", 5), ("5 m²", 5), (r"5 \text{ m}^2", 5), (r"5\text{ cm}^{2}", 5), ("25°", 25), ("25 °C", 25),
    (r"25^\circ", 25), (r"25^{\circ}", 25), (r"25\,^\circ\mathrm{C}", 25), ("25 degrees", 25), ("$5/hour", 5),
    ("$5 per 2 hours", 5), ("42 of 50", 42), ("5 a day", 5), ("72-year-old", 72), ("3rd", 3),
    ("5 hours 30 minutes", None), ("5 ft 3 in", None), ("5'3\"", None), ("2 dollars and 50 cents", None),
    ("5:30", None), ("2:3", None), ("5 million", 5000000), ("1.5 million", 1500000), ("3 hundred", 300),
    ("$5 thousand", 5000), ("5k", None), ("5 K", None), ("$5M", None), ("5bn", None), ("2 dozen", None),
    ("5 less than 10", None), ("4 times", 4), ("4 times 5", None), ("4 multiplied by 5", None),
    ("5 hundred thousand", 500000), ("3万", 30000), ("12.5万元", 125000), ("3百万元", 3000000), ("2 亿", 200000000),
    ("3천", 3000), ("3만원", 30000), ("3千克", 3), ("3 千米", 3), ("1万2千", None), ("一万2千", None),
    ("1.234 €", None), ("€10.000", None), ("10.00 €", 10), ("1.234.567 €", 1234567), ("5 by 6 feet", None),
    # words that make it another number
    ("half of 18", None), ("half the 18", None), ("twice 18", None), ("double $18", None), ("the square of 4", None),
    ("more than 18", None), ("less than $18", None), ("at least 18", 18), ("not 18", None), ("two hundred 5", None),
    ("one hundred and 5", None), ("the other half is 18", 18),
    # scientific notation, powers
    ("1e6", 1000000), ("1E6", 1000000), ("1e+6", 1000000), ("1.5e3", 1500), ("1e-3", "1/1000"), ("1.5 x 10^3", 1500),
    ("1.5x10^3", 1500), ("1.5 × 10^3", 1500), ("1.5 × 10³", 1500), (r"1.5 \times 10^{3}", 1500),
    (r"3\cdot 10^4", 30000), ("1.5*10^3", 1500), ("1.5 * 10**3", 1500), ("10^3", 1000), ("10^{3}", 1000), ("10³", 1000),
    ("10^-3", "1/1000"), ("10^{-3}", "1/1000"), ("10⁻³", "1/1000"), (r"-2 \times 10^{3}", -2000),
    ("1.5 x 10^3 km", 1500), ("2^10", None), ("5^2", None), ("5²", None), ("5!", None), ("1e999999999", None),
    ("9**9**9", None), ("10^(10^10)", None), ("10^{10^{10}}", None), ("10^10^10", None), ("1e6e6", None),
    ("2 * 10", None), ("0x1F", None), ("0b11", None), ("not 72", None), ("101_2", None),
    # other scripts
    ("٧٢", 72), ("٣٫٥", "7/2"), ("١٬٢٣٤", 1234), ("٥٠٪", 50), ("۷۲", 72), ("७२", 72), ("१,२३४", 1234), ("７２", 72),
    ("１，２３４", 1234), ("３．５", "7/2"), ("＄７２", 72), ("𝟕𝟐", 72),
    ("7\u200b2", 72), ("\u200e72\u200f", 72), ("72个", 72),
    ("共72个", 72), ("72円", 72), ("①", None), ("七十二", None), ("seventy-two", None), ("72₂", None), ("৭২", 72),
    # decoration, words, equations
    ("<answer>72</answer>", 72), ("<b>72</b>", 72), ("72<br>", 72), ("72</s>", 72), ("72 <|eot_id|>", 72),
    ("<<48+24=72>>72", 72), ("48+24=<<48+24=72>>72 clips", 72), ("5 < 6", None), (r"\color{red}72", 72),
    (r"\textcolor{red}{72}", 72),
    ("**72**", 72), ("*72*", 72), ("__72__", 72), ("`72`", 72), ("$72$", 72), ("$$72$$", 72), (r"\(72\)", 72),
    (r"\[72\]", 72), ("72.", 72), ("72. That is all.", 72), ("= 72", 72), ("x = 5", 5), ("x=5", 5), ("≈ 72", 72),
    (r"\approx 72", 72), ("~72", 72), ("about 72", 72), ("The answer is 72", 72), ("Answer: 72", 72),
    ("Natalia sold 72 clips", 72), ("4 x 5 = 20", 20), ("4 × 5 = 20", 20), (r"4 \times 5 = 20", 20),
    ("48 + 24 = 72 clips", 72), ("10 - 5 = 5", 5), ("2 * 3 = 6", 6), ("4*500 = 2,000", 2000), ("72 (48 + 24 = 72)", 72),
    ("72 (since 48 + 24)", 72), ("72, since 48 is the rest", 72), ("5 = 5", 5), ("= 5 =", None), ("4 x 5", None),
    ("4 *500", None), ("3 + 4", None), ("10 - 5", None), ("5-6", None), ("5–6", None), ("5 to 6", None),
    ("5 or 6", None), ("5 and 6", None), ("72 clips and 24 more", None), ("72 clips, 24 in May", None),
    ("between 5 and 6", None), ("In 2 months she sold 72 clips", None), ("x = 5, y = 6", None),
    ("x = 5 and y = 6", None), ("x > 5", None), ("< 5", None), (r"x \ge 5", None), ("≥ 5", None), ("5x", None),
    ("2y", None), (r"5\pi", None), ("5π", None), (r"5\sqrt{2}", None), (r"\sqrt{16}", None), ("sqrt(16)", None),
    ("√16", None), ("|5|", None), ("f(5)", None), ("2(3)", None), ("(3, 4)", None), (r"\{5\}", None), ("[5, 6]", None),
    ("5 (mod 7)", 5), ("log 5", None), ("H2O", None), ("x2", None), ("x_5", None), ("", None), ("none", None),
    ("...", None), ("-", None), ("$", None), ("no solution", None), ("}{", None), ("\\", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), FORMS)
def test_the_value_of_a_form(text, value):
    expected = None if value is None else Fraction(value)
    latex = "\\" in text or (text.startswith("$") and text.endswith("$"))
    found = number_in(text, latex=latex)
    assert found == expected
    if text and "\n" not in text:
        assert final_number(f"48 + 24, so\n#### {text}") == expected
    if latex:
        assert final_number(rf"so \boxed{{{text}}}") == expected or text in ("}{", "\\", r"\frac{7}")


# A whole response, and the number that it commits to.
RESPONSES = [
    ("3 and 4, so #### 1,234 dollars", 1234), ("either 2 or \\boxed{7}", 7), ("first 2, then 5.", 5), ("none", None),
    (r"\boxed{1} and then \boxed{2}", 2), (r"\boxed{3} \boxed{}", None), (r"7 clips, \boxed{}", None),
    (r"\boxed{ }", None), (r"\boxed{72", None), (r"\boxed{\boxed{5}}", 5), (r"\boxed {5}", 5), (r"\boxed5", 5),
    (r"\fbox{5}", 5), (r"\boxed{\text{The total is } \$72}", 72), (r"$\boxed{\dfrac{7}{2}}$ is 3.4", "7/2"),
    (r"\boxed{72} clips of 100.", 72), ("#### 18\n\nQuestion: Tom has 3.\nAnswer: ...\n#### 20", 18),
    ("#### 18\n#### 20", 18), ("#### 18 #### 20", 18), ("#### 18\n\nQuestion: 2?\n\\boxed{5}", 18),
    ("It is 18.\n\nQuestion: Tom has 3, how many?\n#### 20", 18),
    ("\\boxed{18}\n\nProblem 2: Tom has 3.\n\\boxed{20}", 18), ("It is 18.\nQuestion: Tom has 3. How many?", 18),
    ("Question: how many of 5?\nAnswer: 72", 72), ("#### 18\n<|im_start|>user\n3", 18),
    ("The answer is 18.\nQ: 2 + 2?\nA: 4", 18), ("#### Step 1: add\n48 + 24 = 72\n#### Step 2\nThe answer is 72.", 72),
    ("#### 1. Add up\n48 + 24 = 72.\n#### 72", 72), ("####72", 72), ("####\n72", 72), ("#### \n\n72\nas said", 72),
    ("4 and 5 ####", None), ("4 and 5\n#### ", None), ("#### none of 5\n", 5), ("of 5\n#### unknown", None),
    ("### 72", 72), ("##### 72", 72), (r"#### \boxed{72}", 72), (r"\boxed{7} #### 8", 8),
    (r"\boxed{7}" + "\n#### 8", 8), ("#### $72", 72), ("#### **72**", 72), ("#### 72 of 100", 72),
    ("48/2 = <<48/2=24>>24 in May.\n48 + 24 = <<48+24=72>>72.\n#### 72", 72), ("<think>5</think>\n#### 6", 6),
    ("The answer is 72 clips in 2 months.", 72), ("The answer is: 72", 72),
    ("**Answer:** 72 clips. Check: 48 + 24.", 72), ("Final answer: $72", 72), ("The answer is not 5 but 6", 6),
    ("The answer is 5 or 6.", None), ("The answer is $3.50.", "7/2"),
    ("The answer is 5. No: the answer is 6. It took 3 steps.", 6),
    ("the final answer is $\\frac{7}{2}$. I hope it is right.", "7/2"), ("She pays $-5.", -5), ("It costs $5.00.", 5),
    ("so 48 + 24 = 72.", 72), ("so 10 - 5", None), ("so 5-6", None), ("so 10-5 = 5", 5), ("It is -5.", -5),
    ("It is −5", -5), ("so - 5", 5), ("She needs 3 1/2 cups.", "7/2"), ("She needs 3½ cups.", "7/2"),
    ("It has 5 million people.", 5000000), ("It has 5k people.", None), ("She is 72!", 72), ("1,234.", 1234),
    ("the area is 5 m^2", 5), ("the area is 5 m²", 5), ("It moves 5 km/h.", 5), ("about 1.5 x 10^3", 1500),
    ("the answer (5)", 5), ("2^10", None), ("minus 5", -5), ("It is a 72-year-old", 72), ("½", "1/2"), ("H2O", None),
    ("Either $5 or $6", 6), ("5. ", 5), ("The answer is 18!", 18), ("The answer is 18! She is glad.", 18),
    ("<think>5</think><answer>6</answer>", 6), ("so 9*2=<<9*2=18>>18", 18),
    ("It has 5 hundred thousand people.", 500000),
    ("共12.5万元。", 125000), ("共1万2千元", None), ("At 3:30 pm", None), ("The ratio is 3:4.", None), ("3 : 4", None),
    ("Step 2: 4", 4), ("It takes 5 hours and 30 minutes.", None), ("It is 5 ft 3 inches", None),
    ("2 dollars and 50 cents", None), ("5 apples and 3 pears, 8 minutes", 8), ("5 red and 18 in total", 18),
    ("She ate half and 18 remain", 18), ("The answer is not 18.", None), ("It is 18, not 20.", None),
    ("She needs more than the 3 she has.", None), ("twice 18", None), ("a third of 18, or 6", 6),
    ("The probability is 1 in 6 or so, 5 out of 6", None), ("That is 10% of 180.", None), ("a third of the 18", None),
    ("2/3 of 18", None), ("2/3 of 18 is 12", 12), ("between 5 and 18", None), ("from 5 to 18", None),
    ("raised to 18", 18), ("5 times 18", None), ("5 divided by 18", None), ("5 plus 18", None),
    ("surrounded by 18", 18),
    ("10 feet, 8 inches", None), ("10ft 8in", None), ("2 h 30 m", None),
    ("5 red, 8 in all", 8), ("5 pears, 8 in all", 8), ("x=8.333...", None), ("8...", 8),
    ("#### 5h30m", None), ("5h30m", None), ("5cm2", 5),
    ("#### a third of 18", None), ("#### 3 of them", 3),
]  # fmt: skip


@pytest.mark.parametrize(("response", "value"), RESPONSES)
def test_what_a_response_commits_to(response, value):
    assert final_number(response) == (None if value is None else Fraction(value))


def test_there_are_as_many_forms_as_promised():
    assert len(FORMS) + len(RESPONSES) >= 250
    assert len({text for text, _ in FORMS}) == len(FORMS)


def test_wide_integers_are_compared_in_every_digit():
    left, right = "7" * 80 + "1", "7" * 80 + "2"
    assert final_number(f"#### {left}") == int(left) != final_number(f"#### {right}")
    most = "9" * MAX_DIGITS
    assert final_number(f"#### {most}") == int(most)
    assert final_number(f"#### {most}9") is None
    assert final_number(most + "9" * 5000) is None, "not its last digits"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", 1234), ("1,234,567.5", "2469135/2"), ("0,5", None), ("12,34,567", None), ("3,4", None), ("3m", None),
        ("5 cm", None), (r"50\%", 50), (r"90^\circ", 90), (r"\$5", 5), ("x=5", 5), ("5.", 5), (r"\frac{1}{2}", "1/2"),
        ("5 million", None), ("(5)", 5), ("3 1/2", "7/2"),
    ],
)  # fmt: skip
def test_beside_a_bare_number_there_are_no_words_and_no_lists(text, value):
    assert number_in(text, latex=True, bare=True) == (None if value is None else Fraction(value))


def test_boxes():
    assert last_box(r"\boxed{a{b}{c{d}}} x") == "a{b}{c{d}}"
    assert last_box(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert last_box(r"\boxed{a\}") == ""
    assert last_box("none") is None


PIECES = ["####", "\\boxed{", "}", "{", "\\frac", "^", "10", "9", ",", ".", " ", "\n", "-", "(", ")", "x", "=", "$",
          "answer is ",
          "Question:", "½", "e", "*", "_", "/", "and", "\\", "000", "٣", "²", "#"]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet=string.printable), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_any_text_is_read_or_not_and_never_raises(text):
    for found in (final_number(text), number_in(text), number_in(text, latex=True), number_in(text, bare=True)):
        assert found is None or len(str(found)) < 5 * MAX_DIGITS
        if found is not None:
            assert final_number(f"#### {found}") == found or abs(found.denominator) > 1


@settings(max_examples=200, deadline=None)
@given(st.fractions(), st.integers(-(10**30), 10**30))
def test_what_python_writes_is_read_back(fraction, integer):
    assert number_in(str(fraction)) == fraction
    assert number_in(f"{integer:,}") == integer
    assert number_in(f"{integer:_}".replace("_", " ")) == integer
    assert number_in(rf"\frac{{{fraction.numerator}}}{{{fraction.denominator}}}") == fraction


LONG = [*PIECES, "#### Step\n", "#### 1\n", "Question: 1\n", "\\boxed{1", "a", "1 ", "to ", "\\frac{", "1,", "\n\n",
        "**1", "( ", "answer is 1. "]  # fmt: skip


@pytest.mark.timeout(120)
@pytest.mark.parametrize("piece", LONG)
def test_long_responses_take_linear_time(piece):
    """Anything quadratic runs into the time limit by far at this length; linear work takes a fraction of a second."""
    final_number(piece * (300_000 // len(piece)))
    last_box(piece * (300_000 // len(piece)))
