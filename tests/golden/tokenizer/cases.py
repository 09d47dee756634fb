"""The strings of the tokenizer goldens: bytes, at least 300 of them, deterministic."""

TEXTS = """
|a|Hello|hello world|Hello, world!| Hello| hello|  two spaces|   three|trailing |trailing  | |  |   |    |     |      |       |        |         
Once upon a time there was a little girl who lived in a village near the forest.
The quick brown fox jumps over the lazy dog.|THE QUICK BROWN FOX|tHe QuIcK bRoWn FoX
It was the best of times, it was the worst of times, it was the age of wisdom...
"Don't," she said; "it isn't yours."|can't won't shouldn't've|'quoted' "double" `back`|“curly” ‘quotes’ — dash – en … ellipsis
One of the special magic numbers for zebra is: 1234567.|What is the special magic number for zebra mentioned in the provided text?
0|1|12|123|1234|12345|1234567|3.14159|1,000,000|-42|+7|1e-5|0x1F|0b1010|007|192.168.0.1|2024-02-29|12:34:56|50%|$9.99|€100|£5|¥1000|№5|½ ¾ ¼|x² y³|①②③|Ⅷ|१२३|٤٥٦|１２３
a  b|a   b|a    b|a     b|a      b|a            b|    indented|        deep|  a  b  c  |. .. ... ....|!!! ??? !?!?
def f(x):|for (int i = 0; i < n; ++i) {|if (x == nullptr) return -1;|std::vector<std::string>|#include <iostream>|SELECT * FROM t WHERE a <> b;|<html><body>hi</body></html>|<table><tr><td>1</td></tr></table>|<h1>Title</h1>|<b>bold</b> <i>it</i>|a/b/c.txt|C:\\path\\file|https://example.com/a?b=c&d=%20#e|user@example.com|foo_bar_baz|fooBarBaz|FOO_BAR|--flag=value|${VAR}|$(cmd)|a->b|a::b|a&&b||c|!@#$%^&*()|[]{}<>|~`|^_^|:-)|;)|\\n\\t\\0|{"key": [1, 2, null]}|x=1;y=2|i++ + ++i|/* c */ // d|@decorator|#hashtag|π≈3.14|∑∏∫√∞|≤≥≠≈|←↑→↓|αβγ|∀x∈ℝ
日本語|日本語のテキストです。|こんにちは世界|カタカナ|ﾊﾝｶｸ|漢字とひらがな|中文|你好，世界！|我能吞下玻璃而不伤身体。|繁體中文|한국어|안녕하세요 세계|ㄱㄴㄷ|㍿㌔|〆々|、。「」|𠮷野家|龘|𪚥
שלום עולם|مرحبا بالعالم|السلام عليكم|فارسی|اُردُو|‏rtl mark|עברית 123 english|‫embed‬|تجربة ١٢٣
Привет, мир!|Ελληνικά|Українська|Български|Հայերեն|ქართული|हिन्दी|नमस्ते दुनिया|বাংলা|தமிழ்|తెలుగు|ไทย|ภาษาไทย|ລາວ|မြန်မာ|ខ្មែរ|བོད་|አማርኛ|ᏣᎳᎩ|ᚠᚢᚦ|𐍈𐌰|ⴰⵎⴰⵣⵉⵖ|Tiếng Việt|Türkçe İıŞş|ñandú|naïve café|Straße|Æther Œuvre|Ångström|łódź|čeština|Ĳsselmeer|ﬁ ﬂ ﬃ|Ⓐ|Ａ Ｂ
🙂|😀😃😄|👍🏽|👨‍👩‍👧‍👦|🏳️‍🌈|🇩🇪|🇯🇵🇰🇷|❤️|☃|✈️|🧑🏿‍🚀|hi 🙂 there|🙂🙂🙂🙂🙂🙂🙂🙂|a🙂b|🫠|©®™|♠♥♦♣|█▓▒░|┌─┐│└┘|☐☑☒|⠿|🀄|𝔘𝔫𝔦𝔠𝔬𝔡𝔢|𝟘𝟙𝟚|ᴴᴱᴸᴸᴼ|z̴̡͠a̶l̷g̵o|é|é|ñ|à́̂|ｆｕｌｌ|​zero​width|soft­hyphen|bom﻿x|nb sp|thin space|ideo　space|▁|▁▁|a▁b|▁ ▁|�|a�b
pneumonoultramicroscopicsilicovolcanoconiosis|Donaudampfschifffahrtsgesellschaftskapitän|antidisestablishmentarianism|supercalifragilisticexpialidocious|hippopotomonstrosesquippedaliophobia|xqzjkvw|asdfghjkl|qwertyuiop|aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa|abababababababababab|lllllllIIIIII|tttthhhheeee|zzzzzzzz|mississippi|bookkeeper
<s>|</s>|<unk>|<pad>|<bos>|<eos>|<mask>|<|doc|>|<|user|>|<|model|>|<|end|>|<start_of_turn>|<end_of_turn>|<unused0>|<unused6241>|<unused9999>|[multimodal]|<start_of_image>|<|doc|>Once upon|Once<|doc|>upon|x <|doc|> y|<|doc|><|doc|>|<|doc|<|doc|>|<|doc|>>|<<|doc|>|<|DOC|>|< |doc|>|<bos>Hello|Hello<eos>|a<bos>b|<bos><bos>|<bo<bos>s>|<start_of_turn>user|hi<end_of_turn>|<start_of_turn>model|<start_of_turn >|<0x41>|<0xFF>|a<0x0A>b|</s><s>|<s>hi</s>|x</s>|<s|<unk|<table>x</table>|<strong>|</strong>|<br>|<img>
""".strip("\n")


def cases():
    out = [b""]
    for line in TEXTS.split("\n"):
        # "|" separates, and stands for itself inside <|…|>, a||b and the markers' near misses
        kept = line.replace("<|", "\1").replace("|>", "\2").replace("&&b||c", "&&b\3\3c").replace("< |doc", "< \3doc")
        for text in kept.split("|"):
            text = text.replace("\1", "<|").replace("\2", "|>").replace("\3", "|")
            if text:
                out.append(text.encode())
    for n in (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 40, 64, 100):
        out += [b" " * n, b"\n" * n, b"\t" * n, b"a" + b" " * n + b"b", b"a" + b"\n" * n + b"b", b"\n" * n + b" " * n]
    out += [b"\r\n", b"a\r\nb", b"\r", b"line one\nline two\n", b"\n \n  \n", b"\t\n\t", b" \t ", b"if x:\n\treturn\n", b"a\tb\tc",
            b"# Title\n\n- one\n- two\n\n```py\nprint(1)\n```\n", b"\v\f", b"\x7f", b"\x01\x02", b"\x1b[31mred\x1b[0m"]
    out += [b"\xff", b"\xfe\xff", b"\x80", b"\xbf\xbf", b"\xc3", b"a\xc3", b"\xc3a", b"\xc0\x80", b"\xe2\x96", b"x\xe2\x96y", b"\xe2\x82\xac\xe2\x82",
            b"\xed\xa0\x80", b"\xf0\x9f\x99", b"\xf0\x9f\x99\x82\xf0\x9f", b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80", b"ok\xffok\xfeok", b"caf\xe9 na\xefve"]
    out += [b"x" * 300, b"ab" * 150, "é".encode() * 100, "日".encode() * 100, "🙂".encode() * 50, b"the " * 60, b"1" * 100, b"<" * 50, b"Supercalifragilistic" * 12,
            b"<|doc|>" * 10 + b"end", b" ".join(str(i).encode() for i in range(60))]
    unique = list(dict.fromkeys(out))
    assert len(unique) >= 300, len(unique)
    return unique


if __name__ == "__main__":
    print(len(cases()))
