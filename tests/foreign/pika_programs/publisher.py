import json
import sys

import pika

connection = pika.BlockingConnection(pika.URLParameters(sys.argv[1]))
channel = connection.channel()
channel.exchange_declare(exchange="payment", exchange_type="topic")
channel.queue_declare(queue="payment_order")
channel.queue_bind(exchange="payment", queue="payment_order", routing_key="payment_order")
order = {"order_id": "123456", "amount": 100}
channel.basic_publish(exchange="payment", routing_key="payment_order", body=json.dumps(order))
connection.close()
