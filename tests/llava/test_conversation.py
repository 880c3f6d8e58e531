"""Prompt templates."""

from llava.conversation import SeparatorStyle, conv_templates


def test_a_copy_has_its_own_turns_and_keeps_every_field():
    template = conv_templates["qwen_1_5"]
    conversation = template.copy()
    conversation.stop_str = "<|im_end|>"
    conversation.append_message(conversation.roles[0], "Hello")
    again = conversation.copy()
    again.append_message(again.roles[1], None)
    assert template.messages == []
    assert len(conversation.messages) == 1
    assert again.stop_str == "<|im_end|>"
    assert "Hello" not in template.get_prompt()


def test_an_open_turn_ends_with_the_models_role():
    conversation = conv_templates["qwen_2"].copy()
    conversation.append_message(conversation.roles[0], "<image>\nWhat moves?")
    conversation.append_message(conversation.roles[1], None)
    assert conversation.get_prompt().endswith("<image>\nWhat moves?<|im_end|>\n<|im_start|>assistant\n")


def test_a_plain_conversation_with_an_answer_ends_both_turns_alike():
    """The published template has no second separator and fails here."""
    conversation = conv_templates["plain"].copy()
    conversation.append_message("", "<image>")
    conversation.append_message("", "a red ball")
    assert conversation.get_prompt() == "<image>\na red ball\n"


def test_a_copy_of_llama_3_still_makes_prompts():
    """The published template needs a tokenizer from the hub, and loses it when it is copied."""
    conversation = conv_templates["llava_llama_3"].copy()
    for message in ("Hi", "Hello", "Bye", None):
        conversation.append_message(conversation.roles[len(conversation.messages) % 2], message)
    assert conversation.stop_token_ids == [128009]
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    turns = [("system", conversation.system), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    written = "".join(f"{head.format(role)}{text}<|eot_id|>" for role, text in turns)
    assert conversation.get_prompt() == written + head.format("assistant")


def test_a_template_is_not_changed_by_its_copies():
    template = conv_templates["qwen_1_5"]
    template.copy().append_message("user", "Hi")
    assert template.messages == []


def test_every_image_of_a_first_turn_keeps_its_tag():
    conversation = conv_templates["qwen_1_5"].copy()
    conversation.append_message(conversation.roles[0], ("<image>\n<image>\nCompare.", None, "Default"))
    assert conversation.get_prompt().count("<image>") == 2


def test_braces_in_a_text_stay():
    for name in conv_templates:
        conversation = conv_templates[name].copy()
        conversation.append_message(conversation.roles[0], "Fill in {role}: {}")
        assert "Fill in {role}: {}" in conversation.get_prompt()


def test_two_separators_alternate():
    conversation = conv_templates["v1"].copy()
    assert conversation.sep_style is SeparatorStyle.TWO
    for message in ("Hi", "Hello", "Bye", None):
        conversation.append_message(conversation.roles[len(conversation.messages) % 2], message)
    assert conversation.get_prompt().endswith("USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT:")
