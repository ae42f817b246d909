// The header compiles as C++ and links, and a program that piehost did not start learns so.
#include <cstring>

#include "inferlet.h"

int main()
{
    pie_pass pass = {};
    pie_sampling sampling = {};
    pie_token token = pie_new_token();
    if (pie_init() != PIE_CLOSED || !std::strstr(pie_error().message, "not started by piehost"))
        return 1;
    pie_queue queue = pie_create_queue(0, nullptr);
    pie_future answer;
    if (queue.id || pie_error().code != PIE_CLOSED)
        return 2;
    if (pie_forward(queue, &pass, nullptr) != PIE_CLOSED)
        return 3;
    int code = pie_sample(queue, pie_emb{1}, 0, token, &sampling, &answer);
    return code == PIE_CLOSED && pie_wait(answer, nullptr) == PIE_CLOSED ? 0 : 4;
}
