#include "engine/engine.h"
#include "engine/arena.h"
#include "engine/attention_spans.h"
#include "engine/scheduler.h"
#include "models/family.h"
#include "models/model.h"
#include "models/tokenizer.h"
int main() { return 0; }
